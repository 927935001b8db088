/* One environment step, for one instruction set: the file that includes this one says which by
 *
 *     NAME      of its InstructionSet        TITLE   the same as text
 *     LANES     floats in a vector
 *     ROWS      rows of a product whose sums stay in registers: ROWS * 4 vectors
 *     PAIRS     1: products of bfloat16 numbers by an instruction that takes pairs
 *
 * Every row goes through the same operations in the same order whatever stands beside it, so its numbers do not depend
 * on how many there are.
 *
 * Dimension key: n environments of the chunk, D width, F features, N tokens of a step: 3, or 2 without the previous
 * action. Rows of activations stand token by token: all previous actions, all returns-to-go, all observations. In the
 * last layer only the observations' rows go on beyond keys and values: the action is read out there and nobody sees the
 * others again. */
#include <math.h>
#include <string.h>
#if PAIRS
#include <immintrin.h>
#endif

#include "packed.h"

namespace drl {
namespace {

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
typedef uint16_t loose_hvec __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

constexpr int COLUMNS = 4; /* vectors of a panel */
constexpr int PANEL = COLUMNS * LANES;

inline vec load(const float *from) { return *(const loose_vec *)from; }
inline void save(float *to, vec value) { *(loose_vec *)to = value; }
inline vec fill(float value) { return value - (vec){}; }
inline vec least(vec x, vec y) { return x < y ? x : y; }
inline vec most(vec x, vec y) { return x > y ? x : y; }

/* By halves, which is both quicker and more exact than lane by lane. */
inline float sum(vec value) {
    typedef float quarter __attribute__((vector_size(16)));
#if LANES == 16
    typedef float half __attribute__((vector_size(32)));
    const half h = __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7) +
                   __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    const vec h = value;
#endif
#if LANES >= 8
    const quarter four = __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
#else
    const quarter four = value;
#endif
    const quarter two = four + __builtin_shufflevector(four, four, 2, 3, 0, 1);
    return two[0] + two[1];
}

inline void keep(float *to, vec value) { save(to, value); }
#if PAIRS
inline void keep(uint16_t *to, vec value) {
    *(loose_hvec *)to = (hvec)_mm512_cvtneps_pbh((__m512)value);
}
#endif

/* exp(x) for x <= 0, relative error below 2e-7, 0 below -87: x = n ln 2 + r, 2^n from the exponent's bits, e^r a minimax
 * polynomial on |r| <= ln 2 / 2. */
inline vec exp_negative(vec x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vec clamped = most(x, fill(-87.0f));
    vec shifted = clamped * 1.44269504f + shift;
    vec n = shifted - shift;
    vec r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = fill(1.38367887e-3f);
    p = p * r + 8.37485678e-3f;
    p = p * r + 4.16682288e-2f;
    p = p * r + 0.166664198f;
    p = p * r + 0.499999911f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    ivec exponent = ((ivec)shifted - (ivec)fill(shift) + 127) << 23;
    return x < -87.0f ? vec{} : p * (vec)exponent;
}

inline vec feature(vec x, int map) {
    if (map == DRL_ELU1) return x > 0.0f ? x + 1.0f : exp_negative(least(x, vec{}));
    if (map == DRL_RELU) return most(x, vec{});
    return x;
}

/* x Phi(x) with erf(x / sqrt 2) = x P(x^2) / Q(x^2) on |x| <= 5.3, a minimax fit of degrees 5 and 5 with error 8e-9. */
inline vec gelu(vec x) {
    vec c = most(least(x, fill(5.3f)), fill(-5.3f));
    vec t = c * c;
    vec p = fill(4.81004001e-8f), q = fill(1.23716643e-6f);
    p = p * t + 1.27581498e-5f;
    q = q * t + 7.13528134e-5f;
    p = p * t + 3.20671941e-4f;
    q = q * t + 1.83657988e-3f;
    p = p * t + 9.25600436e-3f;
    q = q * t + 2.81389039e-2f;
    p = p * t + 6.58718422e-2f;
    q = q * t + 0.249224335f;
    p = p * t + 0.797884524f;
    q = q * t + 1.0f;
    vec half = 0.5f * x;
    return half + half * (c * p / q);
}

enum Finish { STORE, FEATURE, GELU, ADD };

/* The panel's columns of M rows. */
template <int M, class A, class W>
inline void multiply(const A *a, int64_t stride, int inner, const W *w, const float *bias, vec (&sums)[M][COLUMNS]) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; ++c) sums[m][c] = load(bias + c * LANES);
    if constexpr (sizeof(A) == 4) {
#pragma GCC unroll 4
        for (int k = 0; k < inner; ++k, w += PANEL) {
            vec column[COLUMNS];
#pragma GCC unroll 4
            for (int c = 0; c < COLUMNS; ++c) {
                if constexpr (sizeof(W) == 4) column[c] = load((const float *)w + c * LANES);
                else column[c] = (vec)(__builtin_convertvector(*(const loose_hvec *)(w + c * LANES), uvec) << 16);
            }
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
                for (int c = 0; c < COLUMNS; ++c) sums[m][c] += a[m * stride + k] * column[c];
        }
    }
#if PAIRS
    else {
#pragma GCC unroll 4
        for (int k = 0; k < inner; k += 2, w += 2 * PANEL) {
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                int pair;
                memcpy(&pair, a + m * stride + k, 4);
                __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int c = 0; c < COLUMNS; ++c)
                    sums[m][c] = (vec)_mm512_dpbf16_ps(
                        (__m512)sums[m][c], both, (__m512bh)_mm512_loadu_si512(w + 2 * c * LANES));
            }
        }
    }
#endif
}

template <int M, Finish finish, class A, class W, class Y>
inline void rows_of_panel(const Product &product, int panel, const A *a, int64_t a_stride, Y *y, int64_t y_stride,
                          int map) {
    vec sums[M][COLUMNS];
    multiply<M, A, W>(a, a_stride, product.inner, (const W *)product.weights + (int64_t)panel * product.inner * PANEL,
                      product.bias + panel * PANEL, sums);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; ++c) {
            Y *to = y + m * y_stride + panel * PANEL + c * LANES;
            vec value = sums[m][c];
            if (finish == FEATURE) value = feature(value, map);
            if (finish == GELU) value = gelu(value);
            if constexpr (finish == ADD) value += load(to);
            keep(to, value);
        }
}

/* y = finish(a W^T + b) for `rows` rows. */
template <Finish finish, class A, class W, class Y>
void apply(const Product &product, int rows, const A *a, int64_t a_stride, Y *y, int64_t y_stride, int map = 0) {
    for (int panel = 0; panel < product.panels; ++panel) {
        int row = 0;
        for (; row + ROWS <= rows; row += ROWS)
            rows_of_panel<ROWS, finish, A, W>(product, panel, a + row * a_stride, a_stride, y + row * y_stride,
                                              y_stride, map);
        const A *rest = a + row * a_stride;
        Y *to = y + row * y_stride;
        switch (rows - row) {
#if ROWS > 3
        case 5: rows_of_panel<5, finish, A, W>(product, panel, rest, a_stride, to, y_stride, map); break;
        case 4: rows_of_panel<4, finish, A, W>(product, panel, rest, a_stride, to, y_stride, map); break;
        case 3: rows_of_panel<3, finish, A, W>(product, panel, rest, a_stride, to, y_stride, map); break;
#endif
        case 2: rows_of_panel<2, finish, A, W>(product, panel, rest, a_stride, to, y_stride, map); break;
        case 1: rows_of_panel<1, finish, A, W>(product, panel, rest, a_stride, to, y_stride, map); break;
        }
    }
}

/* (x - mean) / sqrt(variance + 1e-5) of `rows` rows of `width` numbers, of which the rest up to `padded` is 0. With a
 * weight, times weight plus bias. */
template <class Y>
void normalise(int rows, int width, int padded, const float *x, Y *y, const float *weight = nullptr,
               const float *bias = nullptr) {
    const float share = 1.0f / width;
    for (int row = 0; row < rows; ++row, x += padded, y += padded) {
        vec total = {}, square = {};
        for (int i = 0; i < padded; i += LANES) total += load(x + i);
        const float mean = sum(total) * share;
        for (int i = 0; i < padded; i += LANES) {
            vec centred = load(x + i) - mean;
            square += centred * centred;
        }
        /* the padding is 0 and was counted as (0 - mean)^2 */
        const float variance = (sum(square) - (padded - width) * mean * mean) * share;
        const float scale = 1.0f / sqrtf(variance + 1e-5f);
        for (int i = 0; i < padded; i += LANES) {
            vec value = (load(x + i) - mean) * scale;
            if (weight) value = value * load(weight + i) + load(bias + i);
            keep(y + i, value);
        }
    }
}

inline void add_scaled(float *to, const float *from, float factor, int count) {
    for (int i = 0; i < count; i += LANES) save(to + i, load(to + i) + factor * load(from + i));
}

inline float dot(const float *x, const float *y, int count) {
    vec total = {};
    for (int i = 0; i < count; i += LANES) total += load(x + i) * load(y + i);
    return sum(total);
}

/* One head, `V` vectors of its values: outputs of the last QUERIES tokens, and S = g^N (S + sum g^-s k_s v_s^T). What a
 * token sees of the tokens of this step comes by `scores`, (QUERIES, N), zero for later ones; `scale` divides by the
 * denominator; `fading` as in Layer, of this head. */
template <int N, int QUERIES, int V, class Y>
inline void read_and_write(int features, int padded, const float *const *q, const float *const *k,
                           const float *const *v, const float (*scores)[N], const float *scale, const float *fading,
                           const float *before, float *after, Y *const *out) {
    vec value[N][V], result[QUERIES][V];
#pragma GCC unroll 3
    for (int t = 0; t < N; ++t)
#pragma GCC unroll 2
        for (int c = 0; c < V; ++c) value[t][c] = load(v[t] + c * LANES) * fading[t];
#pragma GCC unroll 3
    for (int t = 0; t < QUERIES; ++t)
#pragma GCC unroll 2
        for (int c = 0; c < V; ++c) {
            result[t][c] = vec{};
#pragma GCC unroll 3
            for (int s = 0; s < N; ++s) result[t][c] += scores[t][s] * value[s][c];
        }
    for (int i = 0; i < features; ++i)
#pragma GCC unroll 2
        for (int c = 0; c < V; ++c) {
            vec row = before ? load(before + i * padded + c * LANES) : vec{};
#pragma GCC unroll 3
            for (int t = 0; t < QUERIES; ++t) result[t][c] += q[t][i] * row;
#pragma GCC unroll 3
            for (int t = 0; t < N; ++t) row += k[t][i] * value[t][c];
            save(after + i * padded + c * LANES, row * fading[N]);
        }
#pragma GCC unroll 3
    for (int t = 0; t < QUERIES; ++t)
#pragma GCC unroll 2
        for (int c = 0; c < V; ++c) keep(out[t] + c * LANES, result[t][c] * scale[t]);
}

/* Attention of one environment and layer: q, k, v at its first token's row, rows of a token `stride` apart. before is
 * NULL where an episode begins; the previous action then leaves no trace. */
template <int N, int QUERIES, class Y>
void attend(const Packed &p, const Layer &layer, const float *q, float *k, const float *v, int64_t stride,
            const float *before, float *after, Y *out, int64_t out_stride) {
    const int head = p.head, features = p.sizes.width / p.sizes.heads, block = features * head;
    const int first = N - QUERIES; /* the token of the first query */
    if (N == TOKENS && !before) memset(k, 0, sizeof(float) * p.heads_width);
    for (int t = 0; t < QUERIES; ++t) /* no head writes there, and 0 times what others left may be NaN */
        memset(out + t * out_stride + p.sizes.heads * head, 0, sizeof(Y) * (p.heads_width - p.sizes.heads * head));
    for (int h = 0; h < p.sizes.heads; ++h) {
        const float *z_before = before ? before + (int64_t)p.sizes.heads * block + h * head : nullptr;
        float *z_after = after + (int64_t)p.sizes.heads * block + h * head;
        const float *fading = layer.fading + h * (N + 1);
        const float *queries[QUERIES], *keys[N], *values[N];
        float scores[QUERIES][N], scale[QUERIES];
        Y *outs[QUERIES];
        for (int t = 0; t < N; ++t) keys[t] = k + t * stride + h * head, values[t] = v + t * stride + h * head;
        for (int t = 0; t < QUERIES; ++t) {
            queries[t] = q + t * stride + h * head;
            outs[t] = out + t * out_stride + h * head;
            float seen = z_before ? dot(queries[t], z_before, head) : 0.0f;
            for (int s = 0; s < N; ++s) {
                scores[t][s] = s <= first + t ? dot(queries[t], keys[s], head) : 0.0f;
                seen += fading[s] * scores[t][s];
            }
            scale[t] = 1.0f / (seen + 1e-6f * fading[first + t]); /* `seen` is as much too large */
        }
        for (int i = 0; i < head; i += LANES) {
            vec total = z_before ? load(z_before + i) : vec{};
            for (int t = 0; t < N; ++t) total += fading[t] * load(keys[t] + i);
            save(z_after + i, total * fading[N]);
        }
        const float *kv_before = before ? before + h * block : nullptr;
        float *kv_after = after + h * block;
        int column = 0;
        for (; column + 2 * LANES <= head; column += 2 * LANES) {
            read_and_write<N, QUERIES, 2>(features, head, queries, keys, values, scores, scale, fading, kv_before,
                                          kv_after, outs);
            kv_after += 2 * LANES;
            if (kv_before) kv_before += 2 * LANES;
            for (auto &part : values) part += 2 * LANES;
            for (auto &part : outs) part += 2 * LANES;
        }
        if (column < head)
            read_and_write<N, QUERIES, 1>(features, head, queries, keys, values, scores, scale, fading, kv_before,
                                          kv_after, outs);
    }
}

inline int32_t whole(float bits) {
    int32_t value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Tokens of one environment, into rows n apart; the head of its new state. Returns whether an episode begins. */
template <int N>
bool embed(const Packed &p, const Task &task, int e, const float *before, float *after, float *x, int n) {
    const drl_sizes &sizes = p.sizes;
    const int width = p.width;
    int32_t timestep = whole(before[2]);
    const bool begins = timestep == 0 || (task.begins && task.begins[e]);
    if (begins) timestep = 0;
    const float target = before[0], to_go = begins ? target : before[1] - task.reward[e];
    const int64_t last = sizes.max_timesteps - 1, now = timestep < last ? timestep : last;
    const int64_t then = timestep > last ? last : timestep ? timestep - 1 : 0;
    constexpr int absent = TOKENS - N;
    float *token[TOKENS];
    for (int t = absent; t < TOKENS; ++t) {
        token[t] = x + (int64_t)((t - absent) * n + e) * width;
        memcpy(token[t], p.times[t] + (t ? now : then) * width, sizeof(float) * width);
    }
    if (!absent && !begins)
        for (int i = 0; i < sizes.action_dim; ++i)
            add_scaled(token[0], p.embed_action + (int64_t)i * width, before[3 + i], width);
    const float heard = p.return_cap && p.return_cap[now] < to_go ? p.return_cap[now] : to_go;
    add_scaled(token[1], p.embed_return, heard / sizes.return_scale, width);
    const float *observation = task.observation + (int64_t)e * sizes.observation_dim;
    for (int i = 0; i < sizes.observation_dim; ++i)
        add_scaled(token[2], p.embed_observation + (int64_t)i * width, (observation[i] - p.mean[i]) / p.std[i], width);
    const int32_t next = timestep == INT32_MAX ? timestep : timestep + 1;
    after[0] = target, after[1] = to_go;
    memcpy(after + 2, &next, 4);
    return begins;
}

/* A: what rows of activations are, W: what weights are. */
template <int N, class A, class W>
void step_of(const Packed &p, const Task &task) {
    const int n = task.n, all = N * n, width = p.width, wide = p.heads_width;
    const int map = p.sizes.feature_map;
    float *x = (float *)task.workspace;
    float *q = x + (int64_t)all * width, *k = q + (int64_t)all * wide, *v = k + (int64_t)all * wide;
    float *read = v + (int64_t)all * wide;
    A *normal = (A *)(read + n * p.actions), *mixed = normal + (int64_t)all * width;
    A *hidden = mixed + (int64_t)all * wide;
    const float *before[CHUNK];
    float *after[CHUNK];
    bool begins[CHUNK];
    for (int e = 0; e < n; ++e) {
        const int64_t row = task.rows ? task.rows[e] : task.first + e;
        before[e] = task.before + row * p.state_size, after[e] = task.after + row * p.state_size;
        begins[e] = embed<N>(p, task, e, before[e], after[e], x, n);
    }
    normalise(all, p.sizes.width, width, x, x, p.norm_weight, p.norm_bias);
    for (int l = 0; l < p.sizes.layers; ++l) {
        const Layer &layer = p.layers[l];
        const bool last = l == p.sizes.layers - 1;
        const int first = last ? N - 1 : 0, rows = all - first * n; /* the tokens that go on */
        normalise(all, p.sizes.width, width, x, normal);
        apply<FEATURE, A, W>(layer.query, rows, normal + (int64_t)first * n * width, width,
                             q + (int64_t)first * n * wide, wide, map);
        apply<FEATURE, A, W>(layer.key, all, normal, width, k, wide, map);
        apply<STORE, A, W>(layer.value, all, normal, width, v, wide);
        for (int e = 0; e < n; ++e) {
            const int64_t place = p.state_head + (int64_t)l * p.layer_state, stride = (int64_t)n * wide;
            const float *past = begins[e] ? nullptr : before[e] + place;
            const int64_t at = (int64_t)e * wide, query = at + first * stride;
            float *memory = after[e] + place;
            if (last) attend<N, 1>(p, layer, q + query, k + at, v + at, stride, past, memory, mixed + query, stride);
            else attend<N, N>(p, layer, q + query, k + at, v + at, stride, past, memory, mixed + query, stride);
        }
        float *stream = x + (int64_t)first * n * width;
        apply<ADD, A, W>(layer.out, rows, mixed + (int64_t)first * n * wide, wide, stream, width);
        normalise(rows, p.sizes.width, width, stream, normal);
        apply<GELU, A, W>(layer.expand, rows, normal, width, hidden, p.hidden);
        apply<ADD, A, W>(layer.contract, rows, hidden, p.hidden, stream, width);
    }
    normalise(n, p.sizes.width, width, x + (int64_t)(N - 1) * n * width, normal);
    apply<STORE, A, W>(p.action, n, normal, width, read, p.actions);
    const int actions = p.sizes.action_dim;
    for (int e = 0; e < n; ++e) {
        memset(after[e] + 3 + actions, 0, sizeof(float) * (p.state_head - 3 - actions));
        for (int i = 0; i < actions; ++i) {
            const float action = tanhf(read[e * p.actions + i]), low = p.low[i], high = p.high[i];
            after[e][3 + i] = action;
            task.action[(int64_t)e * actions + i] = action * ((high - low) / 2) + (high + low) / 2;
        }
    }
}

template <class A, class W>
void step(const Packed &p, const Task &task) {
    p.tokens == TOKENS ? step_of<TOKENS, A, W>(p, task) : step_of<TOKENS - 1, A, W>(p, task);
}

} // namespace

const InstructionSet NAME = {
    TITLE, PANEL, LANES, PAIRS, step<float, float>,
#if PAIRS
    step<uint16_t, uint16_t>,
#else
    step<float, uint16_t>,
#endif
};

} // namespace drl
