#include <cmath>

#include "check.h"
#include "philox.h"

namespace sf = stars_fast;

void test_philox() {
  // Known-answer vectors published with Random123 (kat_vectors, philox4x32 10).
  CHECK((sf::philox4x32({0, 0, 0, 0}, {0, 0}) ==
         sf::PhiloxCounter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  CHECK(
      (sf::philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}) ==
       sf::PhiloxCounter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  CHECK(
      (sf::philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
       sf::PhiloxCounter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));

  double sum = 0.0;
  constexpr int kDraws = 100000;
  for (int i = 0; i < kDraws; ++i) {
    const double uniform = sf::accept_uniform(42, static_cast<std::uint32_t>(i), 7, 0);
    CHECK(uniform > 0.0 && uniform < 1.0);
    sum += uniform;
  }
  // Five standard deviations of the mean of uniforms.
  CHECK(std::abs(sum / kDraws - 0.5) < 5.0 * 0.2887 / 316.2);
  CHECK(sf::accept_uniform(1, 2, 3, 4) != sf::accept_uniform(1, 3, 2, 4));
  CHECK(sf::accept_uniform(1, 2, 3, 4) != sf::accept_uniform(1, 2, 3, 5));
  CHECK(sf::accept_uniform(1, 2, 3, 4) != sf::accept_uniform(1ULL << 32U, 2, 3, 4));

  // The words of its counter and nothing else, stream and purpose among them.
  constexpr sf::PhiloxCounter kWords = sf::philox4x32({0, 2, 3, (4U << 3U) + 3U}, {5, 6});
  const double bits = std::ldexp(kWords[0], 20) + (kWords[1] >> 12U);
  CHECK(sf::purpose_uniform(5 + (6ULL << 32U), 2, 3, 4, sf::Purpose::kResample) ==
        std::ldexp(bits + 0.5, -52));
  CHECK(sf::accept_uniform(1, 2, 3, 4) == sf::purpose_uniform(1, 2, 3, 4, sf::Purpose::kAccept));
  CHECK(sf::accept_uniform(1, 2, 3, 4) != sf::purpose_uniform(1, 2, 3, 4, sf::Purpose::kChoose));
  CHECK(sf::accept_uniform(1, 2, 3, 4) != sf::purpose_uniform(1, 2, 3, 4, sf::Purpose::kResample));
}
