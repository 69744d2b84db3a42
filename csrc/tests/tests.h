// The tests of native_test, by subject.
#pragma once

namespace pymeta::testing {

void test_kernels();            // kernels_test.cpp
void test_losses();             // losses_test.cpp
void test_cell();               // cell_test.cpp
void test_blocks(bool all);     // blocks_test.cpp
void test_lists();              // lists_test.cpp
void test_fragments();          // fragments_test.cpp
void test_pool(bool may_fork);  // pool_test.cpp

}  // namespace pymeta::testing
