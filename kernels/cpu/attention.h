/* The chunked form of linear attention and its backward (docs/mathematics.md) for one row and one head: every product is
 * small enough for a core's own cache. Included after step.h, once for each instruction set.
 *
 * Arrays stand padded with zeros to multiples of PAD in both directions, so that no product has a remainder. A product
 * with a transposed left factor walks along it; a right factor that is needed transposed is stored so. */
#include "operator.h"

namespace drl {
namespace {

constexpr int PAD = 16;
constexpr int TALL = LANES == 16 ? 8 : 4; /* rows of a tile: TALL * 2 vectors stay in registers */

inline int64_t padded(int64_t count) { return (count + PAD - 1) / PAD * PAD; }

/* An array of floats: `step` from one row to the next, `side` from one column to the next. */
struct Matrix {
    float *at;
    int64_t rows, columns, step, side;
    Matrix transposed() const { return {at, columns, rows, side, step}; }
    float *row(int64_t index) const { return at + index * step; }
};

/* Which numbers of a product over tokens count, of square matrices that are lower triangular:
 *     ALL      all
 *     LOWER    the result is the triangle
 *     PAST     the left factor is the triangle
 *     FUTURE   the left factor is the triangle's transpose */
enum Reach { ALL, LOWER, PAST, FUTURE };

template <int WIDE>
inline void tile(const Matrix &a, const Matrix &b, const Matrix &c, int64_t i, int64_t j, int64_t from, int64_t to,
                 bool add) {
    vec sums[TALL][WIDE];
#pragma GCC unroll 8
    for (int m = 0; m < TALL; ++m)
#pragma GCC unroll 2
        for (int w = 0; w < WIDE; ++w) sums[m][w] = add ? load(c.row(i + m) + j + w * LANES) : vec{};
    const float *left = a.at + i * a.step + from * a.side, *right = b.row(from) + j;
    for (int64_t k = from; k < to; ++k, left += a.side, right += b.step) {
        vec columns[WIDE];
#pragma GCC unroll 2
        for (int w = 0; w < WIDE; ++w) columns[w] = load(right + w * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < TALL; ++m)
#pragma GCC unroll 2
            for (int w = 0; w < WIDE; ++w) sums[m][w] += left[m * a.step] * columns[w];
    }
#pragma GCC unroll 8
    for (int m = 0; m < TALL; ++m)
#pragma GCC unroll 2
        for (int w = 0; w < WIDE; ++w) save(c.row(i + m) + j + w * LANES, sums[m][w]);
}

/* C = A B, or C += A B. */
template <Reach reach>
void product(const Matrix &a, const Matrix &b, const Matrix &c, bool add) {
    for (int64_t i = 0; i < c.rows; i += TALL) {
        const int64_t from = reach == FUTURE ? i : 0, to = reach == PAST ? i + TALL : a.columns;
        const int64_t columns = reach == LOWER ? padded(i + TALL) : c.columns;
        int64_t j = 0;
        for (; j + 2 * LANES <= columns; j += 2 * LANES) tile<2>(a, b, c, i, j, from, to, add);
        if (j < columns) tile<1>(a, b, c, i, j, from, to, add);
    }
}

/* Vector i of row t of a triangle: the future is replaced by zero, whatever it holds. */
inline vec up_to(int64_t t, int64_t i, vec x) {
    if (i + LANES <= t + 1) return x;
    ivec lane;
    for (int l = 0; l < LANES; ++l) lane[l] = l;
    return lane > int(t - i) ? vec{} : x;
}

void transpose(const Matrix &from, const Matrix &to) {
    for (int64_t i = 0; i < to.rows; ++i)
        for (int64_t j = 0; j < to.columns; ++j) to.row(i)[j] = from.row(j)[i];
}

inline const void *place(const drl_numbers &x, const drl_attention &call, int64_t row, int64_t head, int64_t token) {
    return (const char *)x.data + (row * x.batch + token * x.token + head * x.head) * (call.half ? 2 : 4);
}

/* `count` numbers to float32, then zeros up to `columns`. */
template <class X>
inline void read_row(const X *from, int64_t count, float *to, int64_t columns) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        if constexpr (sizeof(X) == 4) save(to + i, load(from + i));
        else save(to + i, (vec)(__builtin_convertvector(*(const loose_hvec *)(from + i), uvec) << 16));
    }
    for (; i < columns; ++i) {
        if constexpr (sizeof(X) == 4) to[i] = i < count ? from[i] : 0;
        else {
            const uint32_t bits = i < count ? (uint32_t)from[i] << 16 : 0;
            memcpy(to + i, &bits, sizeof bits);
        }
    }
}

/* Rows of one head to float32; past the last token and the last number, zeros. */
void read(const drl_attention &call, const drl_numbers &from, int64_t row, int64_t head, int64_t count,
          const Matrix &to) {
    for (int64_t t = 0; t < call.tokens; ++t) {
        const void *numbers = place(from, call, row, head, t);
        if (call.half) read_row((const uint16_t *)numbers, count, to.row(t), to.columns);
        else read_row((const float *)numbers, count, to.row(t), to.columns);
    }
    memset(to.row(call.tokens), 0, (to.rows - call.tokens) * to.step * sizeof(float));
}

/* Round to nearest even, as torch does. */
inline void keep(uint16_t *to, vec value) {
    uvec bits = (uvec)value;
    bits += 0x7fffu + ((bits >> 16) & 1u);
    *(loose_hvec *)to = __builtin_convertvector(bits >> 16, hvec);
}

template <class X>
inline void write_row(const float *from, X *to, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) keep(to + i, load(from + i));
    if (i == count) return;
    X rest[LANES];
    keep(rest, load(from + i));
    memcpy(to + i, rest, (count - i) * sizeof(X));
}

void write(const drl_attention &call, const Matrix &from, const drl_numbers &to, int64_t row, int64_t head,
           int64_t count) {
    for (int64_t t = 0; t < call.tokens; ++t) {
        void *numbers = const_cast<void *>(place(to, call, row, head, t));
        if (call.half) write_row(from.row(t), (uint16_t *)numbers, count);
        else write_row(from.row(t), (float *)numbers, count);
    }
}

inline void clear(float *row, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) row[i] = 0;
}

/* phi of `count` numbers in each row of real tokens; the padding stays zero. */
void map_rows(const drl_attention &call, const Matrix &x, const uint8_t *mask) {
    const int64_t count = call.features;
    for (int64_t t = 0; t < call.tokens; ++t) {
        float *numbers = x.row(t);
        if (mask && !mask[t]) {
            clear(numbers, 0, count);
            continue;
        }
        for (int64_t i = 0; i < count; i += LANES) save(numbers + i, feature(load(numbers + i), call.feature_map));
        clear(numbers, count, x.columns);
    }
}

/* From the gradient of phi(x) to that of x, where phi(x) is known: elu1' is min(phi, 1), relu' is 1 above zero. A masked
 * key is not its token's. */
void unmap_rows(const drl_attention &call, const Matrix &gradient, const Matrix &phi, const uint8_t *mask) {
    for (int64_t t = 0; t < call.tokens; ++t) {
        float *numbers = gradient.row(t);
        if (mask && !mask[t]) {
            clear(numbers, 0, gradient.columns);
            continue;
        }
        for (int64_t i = 0; i < gradient.columns; i += LANES) {
            const vec g = load(numbers + i), p = load(phi.row(t) + i);
            if (call.feature_map == DRL_ELU1) save(numbers + i, g * least(p, fill(1.0f)));
            if (call.feature_map == DRL_RELU) save(numbers + i, p > 0.0f ? g : vec{});
        }
    }
}

/* A (K, V) state between its padded and its plain form; NULL is zero. */
void read_state(const float *from, int64_t rows, int64_t columns, const Matrix &to) {
    memset(to.at, 0, to.rows * to.step * sizeof(float));
    for (int64_t i = 0; from && i < rows; ++i) memcpy(to.row(i), from + i * columns, columns * sizeof(float));
}

void write_state(const Matrix &from, int64_t rows, int64_t columns, float *to) {
    for (int64_t i = 0; i < rows; ++i) memcpy(to + i * columns, from.row(i), columns * sizeof(float));
}

/* What forward and backward have in common: inputs, state, the triangle of weights and the denominators. */
struct Head {
    const drl_attention &call;
    const int64_t row, head, index, T, K, V;
    float *memory;
    const uint8_t *mask;
    const bool past;
    Matrix q, k, v, key_columns, state, weights;
    float *z, *denominator;

    Head(const drl_attention &call, int64_t row, int64_t head, float *memory)
        : call(call), row(row), head(head), index(row * call.heads + head), T(padded(call.tokens)),
          K(padded(call.features)), V(padded(call.values)), memory(memory),
          mask(call.mask ? call.mask + row * call.tokens : nullptr),
          past(call.kv && !(call.restart && call.restart[row])) {
        q = array(T, K), k = array(T, K), v = array(T, V), key_columns = array(K, T), state = array(K, V);
        weights = array(T, T), z = array(1, K).at, denominator = array(1, T).at;
        read(call, call.q, row, head, call.features, q);
        read(call, call.k, row, head, call.features, k);
        read(call, call.v, row, head, call.values, v);
        map_rows(call, q, nullptr);
        map_rows(call, k, mask);
        transpose(k, key_columns);
        read_state(past ? call.kv + index * call.features * call.values : nullptr, call.features, call.values, state);
        read_state(past ? call.z + index * call.features : nullptr, 1, call.features, {z, 1, K, K, 1});
        product<LOWER>(q, key_columns, weights, false);
        for (int64_t t = 0; t < T; ++t) {
            vec seen = {};
            for (int64_t i = 0; i < padded(t + 1); i += LANES) {
                const vec kept = up_to(t, i, load(weights.row(t) + i));
                save(weights.row(t) + i, kept);
                seen += kept;
            }
            for (int64_t i = 0; past && i < K; i += LANES) seen += load(q.row(t) + i) * load(z + i);
            denominator[t] = t < call.tokens ? sum(seen) + call.eps : 1.0f;
        }
    }

    Matrix array(int64_t rows, int64_t columns) {
        float *at = memory;
        memory += rows * columns;
        return {at, rows, columns, columns, 1};
    }
};

void scale(const Matrix &x, int64_t row, float factor) {
    for (int64_t i = 0; i < x.columns; i += LANES) save(x.row(row) + i, load(x.row(row) + i) * factor);
}

void attend_forward(const drl_attention &call, int64_t row, int64_t head, float *memory) {
    Head h(call, row, head, memory);
    const Matrix out = h.array(h.T, h.V);
    product<PAST>(h.weights, h.v, out, false);
    if (h.past) product<ALL>(h.q, h.state, out, true);
    for (int64_t t = 0; t < call.tokens; ++t) scale(out, t, 1.0f / h.denominator[t]);
    write(call, out, call.out, row, head, call.values);

    product<ALL>(h.key_columns, h.v, h.state, true);
    for (int64_t t = 0; t < call.tokens; ++t) add_scaled(h.z, h.k.row(t), 1.0f, h.K);
    write_state(h.state, call.features, call.values, call.kv_after + h.index * call.features * call.values);
    memcpy(call.z_after + h.index * call.features, h.z, call.features * sizeof(float));
}

void attend_backward(const drl_attention &call, int64_t row, int64_t head, float *memory) {
    Head h(call, row, head, memory);
    const int64_t T = h.T, K = h.K, V = h.V, F = call.features, kv_size = F * call.values;
    const Matrix g = h.array(T, V), out = h.array(T, V), columns = h.array(V, T > K ? T : K);
    const Matrix d_weights = h.array(T, T), d_q = h.array(T, K), d_k = h.array(T, K), d_v = h.array(T, V);
    const Matrix d_state = h.array(K, V);
    float *d_z = h.array(1, K).at, *d_denominator = h.array(1, T).at;

    read(call, call.d_out, row, head, call.values, g);
    read(call, call.out, row, head, call.values, out);
    memset(d_denominator, 0, T * sizeof(float));
    for (int64_t t = 0; t < call.tokens; ++t) {
        scale(g, t, 1.0f / h.denominator[t]);
        vec answer = {};
        for (int64_t i = 0; i < V; i += LANES) answer += load(g.row(t) + i) * load(out.row(t) + i);
        d_denominator[t] = -sum(answer);
    }
    read_state(call.d_kv_after ? call.d_kv_after + h.index * kv_size : nullptr, F, call.values, d_state);
    read_state(call.d_z_after ? call.d_z_after + h.index * F : nullptr, 1, F, {d_z, 1, K, K, 1});

    const Matrix value_columns = {columns.at, V, T, T, 1}, state_columns = {columns.at, V, K, K, 1};
    transpose(h.v, value_columns);
    product<LOWER>(g, value_columns, d_weights, false);
    for (int64_t t = 0; t < T; ++t)
        for (int64_t i = 0; i < padded(t + 1); i += LANES)
            save(d_weights.row(t) + i, up_to(t, i, load(d_weights.row(t) + i) + d_denominator[t]));

    product<PAST>(d_weights, h.k, d_q, false);
    if (h.past) {
        transpose(h.state, state_columns);
        product<ALL>(g, state_columns, d_q, true);
        for (int64_t t = 0; t < call.tokens; ++t) add_scaled(d_q.row(t), h.z, d_denominator[t], K);
    }
    product<FUTURE>(d_weights.transposed(), h.q, d_k, false);
    product<FUTURE>(h.weights.transposed(), g, d_v, false);
    if (call.d_kv_after) {
        transpose(d_state, state_columns);
        product<ALL>(h.v, state_columns, d_k, true);
        product<ALL>(h.k, d_state, d_v, true);
    }
    if (call.d_z_after)
        for (int64_t t = 0; t < call.tokens; ++t) add_scaled(d_k.row(t), d_z, 1.0f, K);

    if (call.d_kv) {
        product<ALL>(h.q.transposed(), g, d_state, true);
        for (int64_t t = 0; t < call.tokens; ++t) add_scaled(d_z, h.q.row(t), d_denominator[t], K);
        if (!h.past) memset(d_z, 0, K * sizeof(float)), memset(d_state.at, 0, K * V * sizeof(float));
        write_state(d_state, F, call.values, call.d_kv + h.index * kv_size);
        memcpy(call.d_z + h.index * F, d_z, F * sizeof(float));
    }
    unmap_rows(call, d_q, h.q, nullptr);
    unmap_rows(call, d_k, h.k, h.mask);
    write(call, d_q, call.d_q, row, head, F);
    write(call, d_k, call.d_k, row, head, F);
    write(call, d_v, call.d_v, row, head, call.values);
}

/* The arrays of the backward, which are those of the forward and more. */
int64_t scratch(const drl_attention &call) {
    const int64_t T = padded(call.tokens), K = padded(call.features), V = padded(call.values);
    return T * (5 * K + 6 * V) + 2 * T * T + 3 * K * V + 2 * (T + K);
}

} // namespace

const attention::Kernels attention::NAME = {attend_forward, attend_backward, scratch};

} // namespace drl
