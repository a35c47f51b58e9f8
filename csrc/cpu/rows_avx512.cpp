#define CEPO_ISA avx512
#include "vec_avx512.h"
// The vectors come first: everything below is written in their terms.
#include "divergence.h"
#include "rows.h"

namespace cepo {
Kernels avx512_kernels() {
    return {avx512::forward_rows, avx512::backward_rows, avx512::policy_loss_rows, avx512::divergence_rows,
            avx512::sum_of};
}
}  // namespace cepo
