// What the bindings hand to a row kernel: plain addresses, sizes and strides, in elements. No torch, no Python.
#pragma once

#include <stdint.h>

namespace cepo {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Row i of N = outer * inner starts at data + (i / inner) * outer_stride + (i % inner) * inner_stride.
struct Logits {
    void* data = nullptr;  // null: absent
    Dtype dtype = Dtype::kFloat32;
    int64_t outer_stride = 0, inner_stride = 0;
};

struct Options {
    const double* row_temperature = nullptr;  // (N,), or null: temperature for all
    double temperature = 1.0, scale = 1.0;
    double softcap = 0.0;  // 0: none
    int64_t ignore_index = -100;
};

constexpr int kStats = 4;  // per row: reference, sum of the others, 1 - p, unused

struct Forward {
    Logits policy, positive, negative;
    int64_t inner = 1, vocabulary = 0;
    const int64_t* labels = nullptr;
    const float* advantages = nullptr;
    const bool* negative_mask = nullptr;  // null: every row has its negative teacher
    double lam = 0.0, eps_w = 0.0;
    Options options;
    // (N,) each, null where not wanted; stats (N, kStats).
    float *logprobs = nullptr, *positive_logprobs = nullptr, *negative_logprobs = nullptr, *evidence = nullptr,
          *weight = nullptr, *advantages_out = nullptr, *entropy = nullptr, *stats = nullptr;
};

struct Backward {
    Logits gradient, policy;  // of one dtype, and possibly one memory
    int64_t inner = 1, vocabulary = 0;
    const int64_t* labels = nullptr;
    const float *grad_logprobs = nullptr, *grad_entropy = nullptr;  // (N,) or null
    const float *logprobs = nullptr, *entropy = nullptr, *stats = nullptr;
    Options options;
};

// The policy's loss and, where `gradient` is there, its derivative in the policy's logits, which may be the policy's
// memory. A row whose advantage is 0 is not read and gets zeros unless a KL or entropy term acts on it.
struct PolicyLoss {
    Forward forward;
    Logits gradient;  // of the policy's dtype
    bool cispo = false;
    double clip_low = 0.0, clip_high = 0.0, kl_coef = 0.0, entropy_coef = 0.0;
    double denominator = 1.0;  // of the gradient; losses are not divided by it
    const float *old_logprobs = nullptr, *token_weight = nullptr, *ref_logprobs = nullptr;  // (N,) or null
    // (N,) each.
    float *losses = nullptr, *ratio = nullptr;
    bool* clipped = nullptr;
};

// Divergences of rows, and where `gradient` is there their derivatives in the student's logits, which may be the
// student's memory. A row whose weight is 0 is not read and gets zeros.
struct Divergence {
    Logits student, teacher, gradient;  // gradient of the student's dtype
    int64_t inner = 1, vocabulary = 0;
    const float* weight = nullptr;  // (N,) or null
    int kind = 0;                   // forward KL, reverse KL, jsd
    double beta = 0.5, clip = 0.0;  // clip infinite: none
    int64_t top_k = 0;              // 0: every column is an entry
    Options options;
    float* values = nullptr;  // (N,)
};

// Element (line, k) of an operand, k the summed dimension, stands at data + line * line_stride + k * depth_stride, one
// of the two strides being 1.
struct Operand {
    const void* data = nullptr;
    Dtype dtype = Dtype::kBFloat16;  // or float32, to be rounded to bfloat16
    int64_t line_stride = 0, depth_stride = 1;
};

// out(i, j), at out + i * out_stride + j, is (or, if float32, grows by) the sum over k of left(i, k) right(j, k).
struct Product {
    Operand left, right;
    int64_t rows = 0, columns = 0, depth = 0;
    void* out = nullptr;
    Dtype out_dtype = Dtype::kFloat32;  // or bfloat16, to which the sums are rounded
    int64_t out_stride = 0;
    bool add = false;
};

// One instruction set's kernels, over rows [begin, end).
struct Kernels {
    void (*forward)(const Forward&, int64_t begin, int64_t end);
    void (*backward)(const Backward&, int64_t begin, int64_t end);
    void (*policy_loss)(const PolicyLoss&, int64_t begin, int64_t end);
    void (*divergence)(const Divergence&, int64_t begin, int64_t end);
    float (*sum)(const float* data, int64_t size);  // a plain read, for benchmarks
};

Kernels portable_kernels();
#ifdef CEPO_X86
Kernels avx2_kernels();
Kernels avx512_kernels();
#endif
#ifdef CEPO_AVX512BF16
constexpr int64_t kMostRows = 512, kMostColumns = 1024;  // of a piece: its left panels take little more than 1 MiB
// Of rows [top, bottom) and columns [left, right).
void avx512bf16_product(const Product&, int64_t top, int64_t bottom, int64_t left, int64_t right);
#endif

}  // namespace cepo
