#define CEPO_ISA portable
#include "vec_portable.h"
// vec_portable.h comes first: rows.h is written in its terms
#include "rows.h"

namespace cepo {
Kernels portable_kernels() { return {portable::forward_rows, portable::backward_rows, portable::sum_of}; }
}  // namespace cepo
