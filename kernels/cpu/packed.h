/* The weights as the step reads them, and the sizes of everything. Plain data: what reads it is compiled once for each
 * instruction set, so nothing here may be an inline function that the linker could take from the wrong one. */
#ifndef DRL_PACKED_H
#define DRL_PACKED_H

#include "drl_policy.h"

namespace drl {

constexpr int CHUNK = 16;   /* environments that go through a layer together */
constexpr int TOKENS = 3;   /* previous action, return-to-go, observation; at most */

/* y = x W^T + b with W in panels of `panel` output columns, each panel [inner][panel] so that it is read once, front to
 * back; for products of bfloat16 pairs [inner / 2][panel][2]. Padded with zeros in both directions. */
struct Product {
    const void *weights;
    const float *bias; /* (panels * panel,) */
    int inner, panels;
};

/* The norms before a product are folded into it: their weight into its columns, their bias into its bias. */
struct Layer {
    Product query, key, value, out, expand, contract;
    /* A head's memory fades by g at each token: g^-1 ... g^-tokens, what the keys of a step weigh, then g^tokens, which
     * multiplies what is kept. (heads, tokens + 1); all 1 where nothing fades. */
    const float *fading;
};

struct Packed {
    drl_sizes sizes;
    int panel;                       /* columns of a panel */
    int tokens;                      /* of a step: TOKENS, or one fewer where earlier actions are not read */
    int width;                       /* the residual stream's, padded to whole panels */
    int head, heads_width;           /* features of a head, padded; of all heads, padded to whole panels */
    int hidden, actions;             /* hidden units and action channels, padded to whole panels */
    int state_head, layer_state;     /* floats of a state before the layers, and for each layer */
    int64_t state_size, workspace;   /* floats of a state; bytes that a thread needs for CHUNK environments */
    bool half;                       /* rows of activations are bfloat16: pairs are multiplied */
    const float *embed_return, *embed_observation, *embed_action; /* [features][width] */
    const float *return_cap;        /* (max_timesteps,), or NULL: returns-to-go are read as they are */
    const float *times[TOKENS];      /* [max_timesteps][width], the bias of the token's embedding added */
    const float *norm_weight, *norm_bias; /* of the embedding's norm, (width,) */
    const float *mean, *std, *low, *high;
    const Layer *layers;
    Product action;
};

/* What to do for environments rows[0] ... rows[n-1] of a call, n <= CHUNK. Pointers as in drl_policy_step, at the chunk's
 * first environment. */
struct Task {
    int n;
    const int64_t *rows;
    int64_t first; /* the row of the first environment where rows is NULL */
    const float *observation, *reward;
    const uint8_t *begins;
    const float *before;
    float *after, *action;
    void *workspace;
};

typedef void (*Step)(const Packed &, const Task &);

struct InstructionSet {
    const char *name;
    int panel, lanes;
    bool pairs; /* multiplies bfloat16 pairs */
    Step float32, bfloat16;
};

extern const InstructionSet BASELINE, AVX2, AVX512, AVX512_BF16;

} // namespace drl

#endif
