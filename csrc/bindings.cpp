// The only file that knows Python: exports the core and nothing else.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "acceptance.h"
#include "page_pool.h"
#include "philox.h"
#include "scheduler.h"
#include "sequence_cache.h"

namespace py = pybind11;

namespace stars_fast {
namespace {

template <typename T>
using Input = py::array_t<T, py::array::c_style | py::array::forcecast>;

// A view of a vector that its owner, a Python object, keeps alive.
template <typename T>
py::array_t<T> view(const std::vector<T>& values, const py::object& owner) {
  return py::array_t<T>({values.size()}, {sizeof(T)}, values.data(), owner);
}

template <typename T>
py::array_t<T> view(const std::vector<T>& values, std::int32_t rows, std::int32_t columns,
                    const py::object& owner) {
  const auto width = static_cast<std::size_t>(columns);
  return py::array_t<T>({static_cast<std::size_t>(rows), width}, {width * sizeof(T), sizeof(T)},
                        values.data(), owner);
}

template <typename Owner, typename T>
auto vector_property(std::vector<T> Owner::* member) {
  return
      [member](const py::object& self) { return view(py::cast<const Owner&>(self).*member, self); };
}

py::tuple copy_arrays(const Copies& copies, const py::object& owner) {
  return py::make_tuple(view(copies.source, owner), view(copies.target, owner),
                        view(copies.count, owner));
}

void check_length(const char* name, py::ssize_t length, std::size_t expected) {
  if (static_cast<std::size_t>(length) != expected) {
    throw std::invalid_argument(std::string(name) + " must have " + std::to_string(expected) +
                                " entries, got " + std::to_string(length));
  }
}

py::array_t<std::uint32_t> philox(const Input<std::uint32_t>& counters,
                                  const Input<std::uint32_t>& keys) {
  if (counters.ndim() != 2 || counters.shape(1) != 4 || keys.ndim() != 2 || keys.shape(1) != 2 ||
      counters.shape(0) != keys.shape(0)) {
    throw std::invalid_argument("counters must be [n, 4] and keys [n, 2]");
  }
  py::array_t<std::uint32_t> words({counters.shape(0), py::ssize_t{4}});
  const auto in = counters.unchecked<2>();
  const auto key = keys.unchecked<2>();
  auto out = words.mutable_unchecked<2>();
  for (py::ssize_t i = 0; i < counters.shape(0); ++i) {
    const PhiloxCounter drawn =
        philox4x32({in(i, 0), in(i, 1), in(i, 2), in(i, 3)}, {key(i, 0), key(i, 1)});
    for (py::ssize_t j = 0; j < 4; ++j) {
      out(i, j) = drawn[static_cast<std::size_t>(j)];
    }
  }
  return words;
}

void bind_batch(py::module_& module) {
  py::class_<Batch, std::shared_ptr<Batch>>(module, "Batch")
      .def_property_readonly("num_groups", &Batch::num_groups)
      .def_property_readonly("num_rows", &Batch::num_rows)
      .def_readonly("max_new", &Batch::max_new)
      .def_readonly("num_tokens", &Batch::num_tokens)
      .def_property_readonly("group_pages",
                             [](const py::object& self) {
                               const auto& batch = py::cast<const Batch&>(self);
                               return view(batch.group_pages, batch.num_groups(), batch.table_width,
                                           self);
                             })
      .def_property_readonly("group_extent", vector_property(&Batch::extent))
      .def_property_readonly("padding_start", vector_property(&Batch::padding_start))
      .def_property_readonly("padding_end", vector_property(&Batch::padding_end))
      .def_property_readonly("row_group", vector_property(&Batch::row_group))
      .def_property_readonly("row_start", vector_property(&Batch::start))
      .def_property_readonly("new_lengths", vector_property(&Batch::lengths))
      .def_property_readonly("slots", [](const py::object& self) {
        const auto& batch = py::cast<const Batch&>(self);
        return view(batch.slots, batch.num_rows(), batch.max_new, self);
      });
}

void bind_plan(py::module_& module) {
  py::class_<Plan, std::shared_ptr<Plan>>(module, "Plan")
      .def_property_readonly("copies",
                             [](const py::object& self) {
                               return copy_arrays(py::cast<const Plan&>(self).copies, self);
                             })
      .def_property_readonly(
          "prefill", [](Plan& plan) -> Batch& { return plan.prefill; },
          py::return_value_policy::reference_internal)
      .def_property_readonly(
          "draft", [](Plan& plan) -> Batch& { return plan.draft; },
          py::return_value_policy::reference_internal)
      .def_property_readonly("prefill_tokens", vector_property(&Plan::prefill_tokens))
      .def_property_readonly("prefill_request", vector_property(&Plan::prefill_request))
      .def_property_readonly("request", vector_property(&Plan::request))
      .def_property_readonly("attempt", vector_property(&Plan::attempt))
      .def_property_readonly("seed", vector_property(&Plan::seed))
      .def_property_readonly("position", vector_property(&Plan::position))
      .def_property_readonly("drawn", vector_property(&Plan::drawn))
      .def_property_readonly("stream", vector_property(&Plan::stream))
      .def_property_readonly("first_token", vector_property(&Plan::first_token))
      .def_property_readonly("held", vector_property(&Plan::held))
      .def_property_readonly("held_attempt", vector_property(&Plan::held_attempt))
      .def_property_readonly("unscored", vector_property(&Plan::unscored))
      .def_property_readonly("preempted", vector_property(&Plan::preempted));

  py::class_<Decision, std::shared_ptr<Decision>>(module, "Decision")
      .def_property_readonly("outcome", vector_property(&Decision::outcome))
      .def_property_readonly("threshold", vector_property(&Decision::threshold))
      .def_property_readonly("request", vector_property(&Decision::request))
      .def_property_readonly("kind", vector_property(&Decision::kind))
      .def_property_readonly("row", vector_property(&Decision::row))
      .def_property_readonly("start", vector_property(&Decision::start))
      .def_property_readonly("length", vector_property(&Decision::length))
      .def_property_readonly("attempts", vector_property(&Decision::attempts))
      .def_property_readonly("finish", vector_property(&Decision::finish))
      .def_property_readonly("copy_target", vector_property(&Decision::copy_target))
      .def_property_readonly("copy_source", vector_property(&Decision::copy_source))
      .def_property_readonly("dropped", vector_property(&Decision::dropped))
      .def_property_readonly("chosen", vector_property(&Decision::chosen));

  // Codes of the arrays above.
  module.attr("ROW_PRUNED") = static_cast<int>(RowOutcome::kPruned);
  module.attr("ROW_WINNER") = static_cast<int>(RowOutcome::kWinner);
  module.attr("ROW_KEPT") = static_cast<int>(RowOutcome::kKept);
  module.attr("EVENT_ACCEPTED") = static_cast<int>(EventKind::kAccepted);
  module.attr("EVENT_FALLBACK") = static_cast<int>(EventKind::kFallback);
  module.attr("EVENT_FAILED") = static_cast<int>(EventKind::kFailed);
  module.attr("EVENT_CHOSEN") = static_cast<int>(EventKind::kChosen);
  module.attr("FINISH_NONE") = static_cast<int>(Finish::kNone);
  module.attr("FINISH_STOP") = static_cast<int>(Finish::kStop);
  module.attr("FINISH_LENGTH") = static_cast<int>(Finish::kLength);
}

std::shared_ptr<Decision> commit(Scheduler& scheduler, const Input<std::int64_t>& tokens,
                                 const Input<std::int32_t>& lengths,
                                 const Input<std::uint8_t>& stopped, const Input<double>& rewards,
                                 double seconds, const std::optional<Input<std::uint8_t>>& breaks,
                                 const std::optional<Input<std::uint8_t>>& unfinished) {
  if (tokens.ndim() != 2) {
    throw std::invalid_argument("tokens must be [rows, max_new]");
  }
  RoundResult result;
  result.rows = static_cast<std::size_t>(tokens.shape(0));
  check_length("lengths", lengths.size(), result.rows);
  check_length("stopped", stopped.size(), result.rows);
  check_length("rewards", rewards.size(), result.rows);
  result.tokens = tokens.data();
  result.stride = static_cast<std::size_t>(tokens.shape(1));
  result.lengths = lengths.data();
  result.stopped = stopped.data();
  result.rewards = rewards.data();
  if (breaks.has_value()) {
    check_length("breaks", breaks->size(), result.rows);
    result.breaks = breaks->data();
  }
  if (unfinished.has_value()) {
    check_length("unfinished", unfinished->size(), result.rows);
    result.unfinished = unfinished->data();
  }
  result.seconds = seconds;
  const py::gil_scoped_release unlocked;
  return std::const_pointer_cast<Decision>(scheduler.commit(result));
}

void bind_scheduler(py::module_& module) {
  py::class_<Scheduler>(module, "Scheduler")
      .def(py::init([](std::int32_t num_pages, std::int32_t page_size, std::int32_t max_rows,
                       std::int32_t max_prefill_tokens, bool prefix_caching, double fixed_cost_rows,
                       std::int32_t lanes) {
             return std::make_unique<Scheduler>(SchedulerOptions{num_pages, page_size, max_rows,
                                                                 max_prefill_tokens, prefix_caching,
                                                                 fixed_cost_rows, lanes});
           }),
           py::kw_only(), py::arg("num_pages"), py::arg("page_size") = 16,
           py::arg("max_rows") = 256, py::arg("max_prefill_tokens") = 8192,
           py::arg("prefix_caching") = true, py::arg("fixed_cost_rows") = 16.0,
           py::arg("lanes") = 1)
      .def(
          "add",
          [](Scheduler& self, std::int64_t request, const Input<std::int64_t>& prompt, bool scored,
             std::int32_t segment_length, std::int32_t max_tokens, std::int32_t max_attempts,
             std::int32_t candidates, std::uint64_t seed, double target_reward, double alpha,
             double beta, bool hard, bool choose, bool overrun, bool last_untested,
             std::int32_t draft_attempts, std::vector<std::int32_t> attempts_at,
             std::int32_t attempts_span, std::int32_t plain_from) {
            const Rule rule = !scored ? Rule::kAlways : choose ? Rule::kChoose : Rule::kTest;
            self.add(request, prompt.data(), static_cast<std::size_t>(prompt.size()),
                     RequestOptions{rule, segment_length, max_attempts, candidates, seed,
                                    Schedule{target_reward, alpha, beta, max_tokens, hard}, overrun,
                                    last_untested, draft_attempts, std::move(attempts_at),
                                    attempts_span, plain_from});
          },
          py::arg("request"), py::arg("prompt"), py::kw_only(), py::arg("scored"),
          py::arg("segment_length"), py::arg("max_tokens"), py::arg("max_attempts") = 1,
          py::arg("candidates") = 0, py::arg("seed") = 0, py::arg("target_reward") = 0.0,
          py::arg("alpha") = 0.5, py::arg("beta") = 1.0, py::arg("hard") = false,
          py::arg("choose") = false, py::arg("overrun") = false, py::arg("last_untested") = false,
          py::arg("draft_attempts") = 0, py::arg("attempts_at") = std::vector<std::int32_t>(),
          py::arg("attempts_span") = 1,
          py::arg("plain_from") = std::numeric_limits<std::int32_t>::max())
      .def(
          "add_group",
          [](Scheduler& self, const std::vector<std::int64_t>& requests,
             const std::vector<std::uint64_t>& seeds, const Input<std::int64_t>& prompt,
             bool resample, std::int32_t segment_length, std::int32_t max_tokens,
             std::uint64_t seed, double beta, double ess_threshold, double rejection_rate) {
            RequestOptions options;
            options.rule = Rule::kAlways;
            options.segment_length = segment_length;
            options.max_attempts = 1;
            options.schedule.max_tokens = max_tokens;
            GroupOptions group;
            group.kind = resample ? GroupOptions::Kind::kResample : GroupOptions::Kind::kPrune;
            group.beta = beta;
            group.ess_threshold = ess_threshold;
            group.rejection_rate = rejection_rate;
            group.seed = seed;
            self.add_group(requests, seeds, prompt.data(), static_cast<std::size_t>(prompt.size()),
                           options, group);
          },
          py::arg("requests"), py::arg("seeds"), py::arg("prompt"), py::kw_only(),
          py::arg("resample"), py::arg("segment_length"), py::arg("max_tokens"),
          py::arg("seed") = 0, py::arg("beta") = 1.0, py::arg("ess_threshold") = 0.5,
          py::arg("rejection_rate") = 0.5)
      .def("abort", &Scheduler::abort, py::arg("request"))
      .def("plan",
           [](Scheduler& self) {
             const py::gil_scoped_release unlocked;
             return std::const_pointer_cast<Plan>(self.plan());
           })
      .def("set_prompt_reward", &Scheduler::set_prompt_reward, py::arg("request"),
           py::arg("reward"))
      .def("commit", &commit, py::arg("tokens"), py::arg("lengths"), py::arg("stopped"),
           py::arg("rewards"), py::arg("seconds") = 0.0, py::arg("breaks") = py::none(),
           py::arg("unfinished") = py::none())
      .def("cancel", &Scheduler::cancel)
      .def("clear_cache", &Scheduler::clear_cache)
      .def("tokens", &Scheduler::tokens, py::arg("request"))
      .def("check", &Scheduler::check)
      .def_property_readonly("has_unfinished", &Scheduler::has_unfinished)
      .def_property_readonly("num_running", &Scheduler::num_running)
      .def_property_readonly("num_waiting", &Scheduler::num_waiting)
      .def_property_readonly("pages_used", [](const Scheduler& self) { return self.pool().used(); })
      .def_property_readonly("pages_free",
                             [](const Scheduler& self) { return self.pool().available(); })
      .def_property_readonly("stats", [](const Scheduler& self) {
        const SchedulerStats& stats = self.stats();
        py::dict out;
        out["rounds"] = stats.rounds;
        out["drafted_tokens"] = stats.drafted_tokens;
        out["accepted_tokens"] = stats.accepted_tokens;
        out["prefill_tokens"] = stats.prefill_tokens;
        out["cached_prompt_tokens"] = stats.cached_prompt_tokens;
        out["attempts"] = stats.attempts;
        out["segments"] = stats.segments;
        out["fallbacks"] = stats.fallbacks;
        out["preemptions"] = stats.preemptions;
        out["page_copies"] = stats.page_copies;
        out["rows_carried"] = stats.rows_carried;
        out["paths_copied"] = stats.paths_copied;
        out["paths_dropped"] = stats.paths_dropped;
        return out;
      });
}

void bind_sequence_cache(py::module_& module) {
  py::class_<SequenceCache>(module, "SequenceCache")
      .def(py::init<std::int32_t, std::int32_t>(), py::kw_only(), py::arg("num_pages"),
           py::arg("page_size") = 16)
      .def("open", &SequenceCache::open, py::arg("sequence"))
      .def("close", &SequenceCache::close, py::arg("sequence"))
      .def("__contains__", &SequenceCache::contains, py::arg("sequence"))
      .def(
          "length",
          [](const SequenceCache& self, std::int64_t sequence) {
            return self.tokens(sequence).size();
          },
          py::arg("sequence"))
      .def("tokens", &SequenceCache::tokens, py::arg("sequence"))
      .def(
          "common_prefix",
          [](const SequenceCache& self, std::int64_t sequence, const Input<std::int64_t>& ids) {
            return self.common_prefix(sequence, ids.data(), ids.size());
          },
          py::arg("sequence"), py::arg("token_ids"))
      .def("truncate", &SequenceCache::truncate, py::arg("sequence"), py::arg("length"))
      .def("seal_prompt", &SequenceCache::seal_prompt, py::arg("sequence"))
      .def("copy", &SequenceCache::copy, py::arg("source"), py::arg("target"))
      .def(
          "branch",
          [](SequenceCache& self, const Input<std::int64_t>& sequences,
             const Input<std::int64_t>& branches, const Input<std::int32_t>& starts,
             const Input<std::int64_t>& ids, const Input<std::int32_t>& lengths) {
            SequenceCache::Rows rows;
            rows.count = static_cast<std::size_t>(sequences.size());
            check_length("branches", branches.size(), rows.count);
            check_length("starts", starts.size(), rows.count);
            check_length("lengths", lengths.size(), rows.count);
            rows.sequences = sequences.data();
            rows.branches = branches.data();
            rows.starts = starts.data();
            rows.lengths = lengths.data();
            rows.ids = ids.data();
            rows.num_ids = static_cast<std::size_t>(ids.size());
            auto batch = std::make_shared<Batch>();
            const py::gil_scoped_release unlocked;
            self.branch(rows, *batch);
            return batch;
          },
          py::arg("sequences"), py::arg("branches"), py::arg("starts"), py::arg("token_ids"),
          py::arg("lengths"))
      .def("promote", &SequenceCache::promote, py::arg("branch"), py::arg("length"))
      .def("drop", &SequenceCache::drop, py::arg("branch"))
      .def("take_copies",
           [](SequenceCache& self) {
             auto copies = std::make_unique<Copies>(self.take_copies());
             const Copies& arrays = *copies;
             const py::capsule owner(copies.release(),
                                     [](void* held) { delete static_cast<Copies*>(held); });
             return copy_arrays(arrays, owner);
           })
      .def("check", &SequenceCache::check)
      .def_property_readonly("num_pages",
                             [](const SequenceCache& self) { return self.pool().num_pages(); })
      .def_property_readonly("page_size",
                             [](const SequenceCache& self) { return self.pool().page_size(); })
      .def_property_readonly("pages_used",
                             [](const SequenceCache& self) { return self.pool().used(); })
      .def_property_readonly("pages_free",
                             [](const SequenceCache& self) { return self.pool().available(); });
}

void bind_page_pool(py::module_& module) {
  py::class_<PagePool>(module, "PagePool")
      .def(py::init<std::int32_t, std::int32_t>(), py::kw_only(), py::arg("num_pages"),
           py::arg("page_size") = 16)
      .def("allocate", &PagePool::allocate)
      .def("retain", &PagePool::retain, py::arg("page"))
      .def("release", &PagePool::release, py::arg("page"))
      .def("count", &PagePool::count, py::arg("page"))
      .def(
          "match",
          [](PagePool& self, const Input<std::int32_t>& tokens) {
            std::vector<std::int32_t> pages;
            self.match(tokens.data(), static_cast<std::int32_t>(tokens.size()), pages);
            return pages;
          },
          py::arg("token_ids"))
      .def(
          "publish",
          [](PagePool& self, const std::vector<std::int32_t>& table,
             const Input<std::int32_t>& tokens) {
            check_length("token_ids", tokens.size(),
                         table.size() * static_cast<std::size_t>(self.page_size()));
            for (const std::int32_t page : table) {
              if (self.count(page) == 0) {
                throw std::invalid_argument("page " + std::to_string(page) + " is not held");
              }
            }
            for (std::size_t index = 0; index < table.size(); ++index) {
              self.publish(table, index, tokens.data());
            }
          },
          py::arg("table"), py::arg("token_ids"))
      .def("clear_cache", &PagePool::clear_cache)
      .def("check", py::overload_cast<>(&PagePool::check, py::const_))
      .def_property_readonly("num_pages", &PagePool::num_pages)
      .def_property_readonly("page_size", &PagePool::page_size)
      .def_property_readonly("available", &PagePool::available)
      .def_property_readonly("used", &PagePool::used);
}

}  // namespace
}  // namespace stars_fast

// NOLINTNEXTLINE: the macro is pybind11's
PYBIND11_MODULE(_core, module) {
  using namespace stars_fast;  // NOLINT: one function, nothing else in this scope
  module.doc() = "The C++ core of stars_fast: randomness, pages, acceptance, scheduler.";
  py::register_exception<OutOfPages>(module, "OutOfPagesError", PyExc_MemoryError);
  py::register_exception<RequestTooLarge>(module, "RequestTooLargeError", PyExc_ValueError);
  module.def("philox4x32", &philox, py::arg("counters"), py::arg("keys"));
  module.def("accept_uniform", &accept_uniform, py::arg("seed"), py::arg("position"),
             py::arg("attempt"), py::arg("stream"));
  py::class_<Schedule>(module, "Schedule")
      .def(py::init(
               [](double target_reward, double alpha, double beta, std::int32_t max_tokens,
                  bool hard) { return Schedule{target_reward, alpha, beta, max_tokens, hard}; }),
           py::kw_only(), py::arg("target_reward"), py::arg("alpha"), py::arg("beta"),
           py::arg("max_tokens"), py::arg("hard"))
      .def("threshold", &Schedule::threshold, py::arg("prompt_reward"), py::arg("tokens"))
      .def("accepts", &Schedule::accepts, py::arg("reward"), py::arg("threshold"),
           py::arg("uniform"));
  bind_page_pool(module);
  bind_batch(module);
  bind_plan(module);
  bind_scheduler(module);
  bind_sequence_cache(module);
}
