// The core under ctest, also built with AddressSanitizer and UndefinedBehaviorSanitizer.
#include <cstdio>

void test_philox();
void test_acceptance();
void test_page_pool();
void test_sequence_cache();
void test_group();
void test_scheduler();
void test_c_api();

int main() {
  test_philox();
  test_acceptance();
  test_page_pool();
  test_sequence_cache();
  test_group();
  test_scheduler();
  test_c_api();
  std::puts("7 passed, 0 failed");
  return 0;
}
