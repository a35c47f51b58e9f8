#define CEPO_ISA portable
#include "vec_portable.h"
// The vectors come first: everything below is written in their terms.
#include "divergence.h"
#include "rows.h"

namespace cepo {
Kernels portable_kernels() {
    return {portable::forward_rows, portable::backward_rows, portable::policy_loss_rows, portable::divergence_rows,
            portable::sum_of};
}
}  // namespace cepo
