#define CEPO_ISA avx512
#include "vec_avx512.h"
// vec_avx512.h comes first: rows.h is written in its terms
#include "rows.h"

namespace cepo {
Kernels avx512_kernels() { return {avx512::forward_rows, avx512::backward_rows, avx512::sum_of}; }
}  // namespace cepo
