#define CEPO_ISA avx2
#include "vec_avx2.h"
// The vectors come first: everything below is written in their terms.
#include "divergence.h"
#include "rows.h"

namespace cepo {
Kernels avx2_kernels() {
    return {avx2::forward_rows, avx2::backward_rows, avx2::policy_loss_rows, avx2::divergence_rows, avx2::sum_of};
}
}  // namespace cepo
