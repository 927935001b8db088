/* A call of the operator on one chunk of tokens, as the instruction sets and the C interface both see it. Plain data, as
 * in packed.h. Dimension key: B batch, T tokens, H heads, K features, V values. */
#ifndef DRL_OPERATOR_H
#define DRL_OPERATOR_H

#include <stdint.h>

/* Numbers (B, T, H, K or V), whose last axis is dense: distances in numbers. NULL: not there. */
typedef struct {
    void *data;
    int64_t batch, token, head;
} drl_numbers;

typedef struct {
    int64_t batch, tokens, heads, features, values;
    int32_t half, feature_map; /* half: drl_numbers are bfloat16, otherwise float32 */
    float eps;
    const char *instruction_set; /* one that the machine has; NULL: the best */
    drl_numbers q, k, v, out;
    const uint8_t *mask, *restart; /* (B, T), (B,); or NULL */
    const float *kv, *z;           /* (B, H, K, V), (B, H, K); or NULL: an empty past */
    float *kv_after, *z_after;
    /* read by the backward, NULL where there is none: */
    drl_numbers d_out;
    const float *d_kv_after, *d_z_after;
    /* written by it; d_kv and d_z may be NULL: */
    drl_numbers d_q, d_k, d_v;
    float *d_kv, *d_z;
} drl_attention;

namespace drl {
namespace attention {

/* `of` one row and one head; the memory is `scratch(call)` floats. */
struct Kernels {
    void (*forward)(const drl_attention &, int64_t row, int64_t head, float *memory);
    void (*backward)(const drl_attention &, int64_t row, int64_t head, float *memory);
    int64_t (*scratch)(const drl_attention &);
};

extern const Kernels BASELINE, AVX2, AVX512;

} // namespace attention
} // namespace drl

#endif
