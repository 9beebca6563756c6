// The operators for one instruction set; compiled once for each, see vectors.h.
#include "kernels.h"

#include "vectors.h"

namespace stars_fast::cpu::STARS_SET {
namespace {

// Calls f(offset, load, store) for the whole vectors of [0, dim) and for what is left.
template <class F>
inline void each_vector(Index dim, F&& f) {
  Index i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    f(i, [](const float* p) { return load(p); }, [](float* p, Vec x) { store(p, x); });
  }
  if (const int left = static_cast<int>(dim - i); left > 0) {
    f(
        i, [left](const float* p) { return load_some(p, left); },
        [left](float* p, Vec x) { store_some(p, x, left); });
  }
}

void norm(const Norm& a, Index begin, Index end) {
  for (Index token = begin; token < end; ++token) {
    for (Index head = 0; head < a.heads; ++head) {
      const Index at = head * a.dim;
      const float* x = a.x + token * a.x_stride + at;
      if (a.residual != nullptr) {
        const float* residual = a.residual + token * a.residual_stride + at;
        float* sum = a.sum + token * a.sum_stride + at;
        each_vector(a.dim, [&](Index i, auto get, auto put) {
          put(sum + i, get(x + i) + get(residual + i));
        });
        x = sum;
      }
      Vec squares{};
      each_vector(a.dim, [&](Index i, auto get, auto) {
        const Vec v = get(x + i);
        squares += v * v;
      });
      const float mean = total(squares) / static_cast<float>(a.dim);
      const Vec scale = spread(1.0F / __builtin_sqrtf(mean + a.eps));
      float* out = a.out + token * a.out_stride + at;
      each_vector(a.dim, [&](Index i, auto get, auto put) {
        put(out + i, get(x + i) * scale * (get(a.weight + i) + a.offset));
      });
    }
  }
}

inline Vec sigmoid(Vec x) { return 1.0F / (1.0F + exp(-x)); }

void gated(const Gated& a, Index begin, Index end) {
  const bool silu = a.act == Gate::kSilu;
  for (Index token = begin; token < end; ++token) {
    const float* gate = a.gate + token * a.stride;
    const float* up = a.up + token * a.stride;
    float* out = a.out + token * a.dim;
    each_vector(a.dim, [&](Index i, auto get, auto put) {
      const Vec x = get(gate + i);
      // gelu by tanh is x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)).
      const Vec z = silu ? x : 1.59576912F * (x + 0.044715F * x * x * x);
      put(out + i, x * sigmoid(z) * get(up + i));
    });
  }
}

void rotate(const Rotated& a, Index begin, Index end) {
  const Index dim = a.rotary.dim;
  const Index half = dim / 2;
  for (Index token = begin; token < end; ++token) {
    const float* cos = a.rotary.cos + token * dim;
    const float* sin = a.rotary.sin + token * dim;
    for (Index head = 0; head < a.heads; ++head) {
      float* x = a.x + token * a.stride + head * a.head_dim;
      if (a.rotary.interleaved) {
        for (Index i = 0; i < dim; i += 2) {
          const float first = x[i];
          const float second = x[i + 1];
          x[i] = first * cos[i] - second * sin[i];
          x[i + 1] = second * cos[i + 1] + first * sin[i + 1];
        }
        continue;
      }
      each_vector(half, [&](Index i, auto get, auto put) {
        const Vec first = get(x + i);
        const Vec second = get(x + half + i);
        put(x + i, first * get(cos + i) - second * get(sin + i));
        put(x + half + i, second * get(cos + half + i) + first * get(sin + half + i));
      });
    }
  }
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// What the keys seen so far amount to, for each query of a block.
struct Running {
  float* values;   // [queries, value_dim], weighted sums
  float* scores;   // [queries, kScores]
  float* highest;  // [queries]
  float* weight;   // [queries], sums of weights
};

// Scores of N queries for two keys.
template <int N>
inline void score(const float* const* query, const float* const* keys, Index dim, float* const* out,
                  Index at) {
  Vec first[N] = {};
  Vec second[N] = {};
  Index i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    const Vec k0 = load(keys[0] + i);
    const Vec k1 = load(keys[1] + i);
    for (int n = 0; n < N; ++n) {
      const Vec q = load(query[n] + i);
      first[n] += q * k0;
      second[n] += q * k1;
    }
  }
  for (int n = 0; n < N; ++n) {
    float sum0 = total(first[n]);
    float sum1 = total(second[n]);
    for (Index j = i; j < dim; ++j) {
      sum0 += query[n][j] * keys[0][j];
      sum1 += query[n][j] * keys[1][j];
    }
    out[n][at] = sum0;
    out[n][at + 1] = sum1;
  }
}

// Adds weights[n][at..at + 4) times four values to sums[n].
template <int N>
inline void weigh(float* const* sums, float* const* weights, Index at, const float* const* values,
                  Index dim) {
  each_vector(dim, [&](Index i, auto get, auto put) {
    const Vec v0 = get(values[0] + i);
    const Vec v1 = get(values[1] + i);
    const Vec v2 = get(values[2] + i);
    const Vec v3 = get(values[3] + i);
    for (int n = 0; n < N; ++n) {
      const float* w = weights[n] + at;
      put(sums[n] + i, get(sums[n] + i) + (w[0] * v0 + w[1] * v1) + (w[2] * v2 + w[3] * v3));
    }
  });
}

// Reads `count` keys, at most kChunk, into the sums of some queries.
struct Chunk {
  const std::int32_t* slots;
  Index count;
  Index first;    // number of the first query
  Index queries;  // adjacent ones
};

constexpr Index whole_fours(Index count) { return (count + 3) / 4 * 4; }

constexpr Index kAhead = 8;  // tokens between a read and its prefetch

// Heads of a token lie side by side, so a head's keys are too far apart for the processor's own
// prefetching.
inline void fetch(const float* tokens, const Chunk& chunk, Index k, Index stride, Index dim) {
  if (k < chunk.count) {
    const float* token = tokens + static_cast<Index>(chunk.slots[k]) * stride;
    for (Index i = 0; i < dim; i += 16) {
      __builtin_prefetch(token + i);
    }
  }
}

// Up to four queries that read keys together.
struct Together {
  int count;
  const float* query[4];
  float* scores[4];
  float* sums[4];
};

// Calls f with a constant of the number of queries, for which the compiler keeps sums in registers.
template <class F>
inline void by_count(int count, F&& f) {
  switch (count) {
    case 1:
      f(Count<1>{});
      break;
    case 2:
      f(Count<2>{});
      break;
    case 3:
      f(Count<3>{});
      break;
    default:
      f(Count<4>{});
      break;
  }
}

void score_keys(const Attention& a, const float* keys, const Chunk& chunk, bool fetches,
                const Together& some) {
  const Index stride = a.kv_heads * a.key_dim;
  for (Index k = 0; k < chunk.count; k += 2) {
    // A last key without a partner is scored twice; the second score is not read.
    const Index next = k + 1 < chunk.count ? k + 1 : k;
    const float* pair[2] = {keys + static_cast<Index>(chunk.slots[k]) * stride,
                            keys + static_cast<Index>(chunk.slots[next]) * stride};
    if (fetches) {
      fetch(keys, chunk, k + kAhead, stride, a.key_dim);
      fetch(keys, chunk, k + kAhead + 1, stride, a.key_dim);
    }
    by_count(some.count, [&](auto n) {
      score<decltype(n)::value>(some.query, pair, a.key_dim, some.scores, k);
    });
  }
}

// Makes weights of a query's scores, exp(score - highest), and fades what was summed before if
// there is a new highest. Zeros behind the scores, up to `padded`.
void weigh_scores(const Attention& a, Index count, Index padded, float* s, Index q,
                  const Running& running) {
  each_vector(count, [&](Index i, auto get, auto put) {
    Vec score = get(s + i) * a.scaling;
    if (a.softcap > 0.0F) {
      // cap * tanh(s / cap), tanh(x) = 2 sigmoid(2 x) - 1
      score = a.softcap * (2.0F * sigmoid(score * (2.0F / a.softcap)) - 1.0F);
    }
    put(s + i, score);
  });
  float highest = running.highest[q];
  for (Index k = 0; k < count; ++k) {
    highest = s[k] > highest ? s[k] : highest;
  }
  if (highest > running.highest[q]) {
    const float fade = exp(spread(running.highest[q] - highest))[0];
    float* sum = running.values + q * a.value_dim;
    each_vector(a.value_dim,
                [&](Index i, auto get, auto put) { put(sum + i, get(sum + i) * fade); });
    running.weight[q] *= fade;
    running.highest[q] = highest;
  }
  for (Index k = count; k < padded; ++k) {
    s[k] = -1e30F;
  }
  Vec weight{};
  each_vector(padded, [&](Index i, auto get, auto put) {
    put(s + i, exp(get(s + i) - highest));
    weight += get(s + i);
  });
  running.weight[q] += total(weight);
}

void add_values(const Attention& a, const float* values, const Chunk& chunk, Index padded,
                bool fetches, const Together& some) {
  const Index stride = a.kv_heads * a.value_dim;
  for (Index k = 0; k < padded; k += 4) {
    const float* four[4];
    for (Index j = 0; j < 4; ++j) {
      // Past the end, a value that is read anyway: its weight is 0.
      const Index slot = chunk.slots[k + j < chunk.count ? k + j : k];
      four[j] = values + slot * stride;
      if (fetches) {
        fetch(values, chunk, k + j + kAhead, stride, a.value_dim);
      }
    }
    by_count(some.count, [&](auto n) {
      weigh<decltype(n)::value>(some.sums, some.scores, k, four, a.value_dim);
    });
  }
}

// Calls f with up to four queries of a chunk that read its keys together, and whether they are the
// first to do so. The chunk's scores begin at `at`.
template <class F>
void each_together(const Attention& a, Index kv_head, const Block& block, const Chunk& chunk,
                   Index at, const Running& running, F&& f) {
  const Index group = a.heads / a.kv_heads;
  for (Index from = 0; from < chunk.queries; from += 4) {
    const Index left = chunk.queries - from;
    Together some{left < 4 ? static_cast<int>(left) : 4, {}, {}, {}};
    for (int n = 0; n < some.count; ++n) {
      const Index q = chunk.first + from + n;
      const Index row = block.first_row + q / group;
      some.query[n] = a.query + row * a.query_stride + (kv_head * group + q % group) * a.key_dim;
      some.scores[n] = running.scores + q * kScores + at;
      some.sums[n] = running.values + q * a.value_dim;
    }
    f(some, from == 0);
  }
}

void score_chunk(const Attention& a, Index kv_head, const Block& block, const Chunk& chunk,
                 Index at, const Running& running) {
  const float* keys = a.k_pages + kv_head * a.key_dim;
  each_together(a, kv_head, block, chunk, at, running,
                [&](const Together& some, bool first) { score_keys(a, keys, chunk, first, some); });
}

// Weighs the `count` scores of the chunk's queries.
void weigh_chunk(const Attention& a, const Chunk& chunk, Index count, const Running& running) {
  for (Index q = chunk.first; q < chunk.first + chunk.queries; ++q) {
    weigh_scores(a, count, whole_fours(count), running.scores + q * kScores, q, running);
  }
}

void sum_chunk(const Attention& a, Index kv_head, const Block& block, const Chunk& chunk, Index at,
               const Running& running) {
  const float* values = a.v_pages + kv_head * a.value_dim;
  each_together(a, kv_head, block, chunk, at, running, [&](const Together& some, bool first) {
    add_values(a, values, chunk, whole_fours(chunk.count), first, some);
  });
}

// Reads the chunk in which the prefix ends: `shared` keys of all queries, `own` keys of each row.
// It is summed as a chunk whose keys all are a row's own.
void read_border(const Attention& a, Index kv_head, const Block& block, const std::int32_t* shared,
                 Index num_shared, Index num_own, const Running& running) {
  const Index group = a.heads / a.kv_heads;
  const Index queries = block.rows * group;
  const auto own_of = [&](Index row) { return a.own + (block.first_row + row) * a.own_width; };
  score_chunk(a, kv_head, block, {shared, num_shared, 0, queries}, 0, running);
  for (Index row = 0; row < block.rows; ++row) {
    score_chunk(a, kv_head, block, {own_of(row), num_own, row * group, group}, num_shared, running);
  }
  weigh_chunk(a, {nullptr, 0, 0, queries}, num_shared + num_own, running);
  const Index fours = num_shared / 4 * 4;
  sum_chunk(a, kv_head, block, {shared, fours, 0, queries}, 0, running);
  std::int32_t slots[kChunk];
  for (Index k = fours; k < num_shared; ++k) {
    slots[k - fours] = shared[k];
  }
  for (Index row = 0; row < block.rows; ++row) {
    for (Index k = 0; k < num_own; ++k) {
      slots[num_shared - fours + k] = own_of(row)[k];
    }
    const Chunk rest{slots, num_shared - fours + num_own, row * group, group};
    sum_chunk(a, kv_head, block, rest, fours, running);
  }
}

Running running_of(const Attention& a, const Block& block, Index head, float* scratch) {
  const Index queries = block.rows * (a.heads / a.kv_heads);
  float* own = scratch + head * scratch_floats(queries, a.value_dim);
  float* highest = own + queries * (a.value_dim + kScores);
  return {own, own + queries * a.value_dim, highest, highest + queries};
}

void begin_head(const Attention& a, const Block& block, Index kv_head, const Running& running) {
  const Index group = a.heads / a.kv_heads;
  const Index queries = block.rows * group;
  for (Index i = 0; i < queries * a.value_dim; ++i) {
    running.values[i] = 0.0F;
  }
  for (Index q = 0; q < queries; ++q) {
    // A sink is a key without a value. Otherwise any number that fades away will do.
    const bool sink = a.sinks != nullptr;
    running.highest[q] = sink ? a.sinks[kv_head * group + q % group] : -1e30F;
    running.weight[q] = sink ? 1.0F : 0.0F;
  }
}

void end_head(const Attention& a, const Block& block, Index kv_head, const Running& running) {
  const Index group = a.heads / a.kv_heads;
  for (Index q = 0; q < block.rows * group; ++q) {
    const Index row = block.first_row + q / group;
    float* out = a.out + (row * a.heads + kv_head * group + q % group) * a.value_dim;
    const float share = 1.0F / running.weight[q];
    each_vector(a.value_dim, [&](Index i, auto get, auto put) {
      put(out + i, get(running.values + q * a.value_dim + i) * share);
    });
  }
}

// Chunks begin at multiples of kChunk of a row's text, whatever part of it is the prefix: what a
// query sums does not depend on where the round began.
void attend(const Attention& a, const Block& block, Heads heads, float* scratch) {
  const Index group = a.heads / a.kv_heads;
  const Index queries = block.rows * group;
  const Index prefix = block.prefix_length;
  const Index length = prefix + a.own_length;
  // The window ends at the query's own token.
  const Index seen = a.window > 0 && length > a.window ? length - a.window : Index{0};
  const auto chunk_end = [length](Index from) {
    const Index end = (from / kChunk + 1) * kChunk;
    return end < length ? end : length;
  };
  const auto each_head = [&](auto f) {
    for (Index head = 0; head < heads.count; ++head) {
      f(heads.first + head, running_of(a, block, head, scratch));
    }
  };
  // Heads of a token lie side by side: a chunk of the keys is read by all of them in turn.
  const auto read = [&](const Chunk& chunk) {
    each_head([&](Index head, const Running& running) {
      score_chunk(a, head, block, chunk, 0, running);
      weigh_chunk(a, chunk, chunk.count, running);
      sum_chunk(a, head, block, chunk, 0, running);
    });
  };
  each_head([&](Index head, const Running& running) { begin_head(a, block, head, running); });
  Index from = seen;
  for (; from < prefix; from = chunk_end(from)) {
    const Index end = chunk_end(from);
    if (end <= prefix) {
      read({block.prefix + from, end - from, 0, queries});
    } else {
      each_head([&](Index head, const Running& running) {
        read_border(a, head, block, block.prefix + from, prefix - from, end - prefix, running);
      });
    }
  }
  for (Index row = 0; row < block.rows; ++row) {
    const std::int32_t* own = a.own + (block.first_row + row) * a.own_width;
    for (Index k = from; k < length; k = chunk_end(k)) {
      read({own + (k - prefix), chunk_end(k) - k, row * group, group});
    }
  }
  each_head([&](Index head, const Running& running) { end_head(a, block, head, running); });
}

}  // namespace

const SampleKernels& sampling();
extern const Kernels table;
const Kernels table{kName, norm, gated, rotate, attend, sampling};

}  // namespace stars_fast::cpu::STARS_SET
