/* AVX-512 with products of bfloat16 pairs. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#endif
#define NAME AVX512_BF16
#define TITLE "avx512-bf16"
#define LANES 16
#define ROWS 6
#define PAIRS 1
#include "step.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
