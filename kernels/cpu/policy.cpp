/* The library's door: choose the instruction set, pack the weights once, hand out chunks of environments. */
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "file.h"
#include "packed.h"
#include "pool.h"

using drl::InstructionSet;
using drl::Packed;
using drl::Product;

namespace {

struct Free {
    void operator()(void *memory) const { std::free(memory); }
};

/* Memory that begins at a cache line, filled with zeros. */
std::unique_ptr<char, Free> zeros(size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    char *memory = static_cast<char *>(std::aligned_alloc(64, bytes));
    if (!memory) throw std::bad_alloc();
    std::memset(memory, 0, bytes);
    return std::unique_ptr<char, Free>(memory);
}

int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

std::vector<const InstructionSet *> instruction_sets() {
    std::vector<const InstructionSet *> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&drl::AVX512_BF16);
    if (avx512) found.push_back(&drl::AVX512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&drl::AVX2);
#endif
    found.push_back(&drl::BASELINE);
    return found;
}

const InstructionSet &chosen(const char *name) {
    for (const InstructionSet *set : instruction_sets())
        if (!name || !std::strcmp(name, set->name)) return *set;
    throw std::invalid_argument(std::string("this machine has no instruction set ") + name + "; it has " +
                                drl_instruction_sets());
}

bool finite(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return (bits & 0x7f800000u) != 0x7f800000u;
}

bool finite(const float *values, int64_t count) {
    bool all = true;
    for (int64_t i = 0; i < count; ++i) all &= finite(values[i]);
    return all;
}

/* The arrays that the weights come in, by name and checked; each must be asked for, or it is not understood. */
class Tensors {
public:
    Tensors(const drl_tensor *tensors, int64_t count) {
        for (int64_t i = 0; i < count; ++i) named_[tensors[i].name] = &tensors[i];
    }
    bool has(const std::string &name) const { return named_.count(name); }
    const float *get(const std::string &name, int64_t count) const {
        asked_.insert(name);
        const auto found = named_.find(name);
        if (found == named_.end()) throw std::invalid_argument("the weights lack " + name);
        if (found->second->count != count)
            throw std::invalid_argument(name + " has " + std::to_string(found->second->count) + " numbers, expected " +
                                        std::to_string(count));
        if (!finite(found->second->data, count)) throw std::invalid_argument(name + " is not finite");
        return found->second->data;
    }
    void require_all_known() const {
        for (const auto &entry : named_)
            if (!asked_.count(entry.first))
                throw std::invalid_argument("this library does not know " + entry.first + "; install drl again");
    }

private:
    std::map<std::string, const drl_tensor *> named_;
    mutable std::set<std::string> asked_;
};

uint16_t half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

} // namespace

struct drl_policy {
    Packed packed;
    const InstructionSet *set;
    drl::Step step;
    float target_return = NAN;
    std::vector<drl::Layer> layers;
    std::vector<std::unique_ptr<char, Free>> memory;

    drl_policy(const drl_sizes &sizes, const Tensors &tensors, int precision, const char *instruction_set)
        : packed{}, set(&chosen(instruction_set)), half_(precision == DRL_BFLOAT16) {
        if (precision != DRL_FLOAT32 && precision != DRL_BFLOAT16)
            throw std::invalid_argument("unknown precision " + std::to_string(precision));
        step = half_ ? set->bfloat16 : set->float32;
        check(sizes);
        packed.sizes = sizes;
        /* without these earlier actions are not read */
        const bool actions = tensors.has("model.embed_action.weight") || tensors.has("model.embed_action.bias");
        packed.tokens = actions ? drl::TOKENS : drl::TOKENS - 1;
        lay_out();
        embeddings(tensors);
        pack_layers(tensors);
        tensors.require_all_known();
    }

private:
    bool half_;

    static void check(const drl_sizes &s) {
        for (int32_t size : {s.observation_dim, s.action_dim, s.width, s.layers, s.heads, s.max_timesteps})
            if (size < 1 || size > 1 << 20) throw std::invalid_argument("a size is not between 1 and 1048576");
        if (s.width > 1 << 14 || s.layers > 1 << 10) throw std::invalid_argument("the model is too large");
        if (s.width % s.heads) throw std::invalid_argument("heads must divide width");
        if (s.feature_map < DRL_ELU1 || s.feature_map > DRL_IDENTITY)
            throw std::invalid_argument("unknown feature map " + std::to_string(s.feature_map));
        if (!(s.return_scale > 0)) throw std::invalid_argument("return_scale must be positive");
    }

    void lay_out() {
        const drl_sizes &s = packed.sizes;
        const int panel = set->panel, features = s.width / s.heads;
        packed.panel = panel;
        packed.half = half_ && set->pairs;
        packed.width = padded(s.width, panel);
        packed.head = padded(features, set->lanes);
        packed.heads_width = padded(int64_t(s.heads) * packed.head, panel);
        packed.hidden = padded(4 * int64_t(s.width), panel);
        packed.actions = padded(s.action_dim, panel);
        packed.state_head = padded(3 + s.action_dim, 16);
        packed.layer_state = s.heads * (features + 1) * packed.head;
        packed.state_size = packed.state_head + int64_t(s.layers) * packed.layer_state;
        const int64_t rows = packed.tokens * drl::CHUNK;
        packed.workspace = 4 * (rows * (2 * int64_t(packed.width) + 4 * int64_t(packed.heads_width) + packed.hidden) +
                                int64_t(drl::CHUNK) * packed.actions);
    }

    float *floats(int64_t count) { return reinterpret_cast<float *>(bytes(count * 4)); }

    char *bytes(int64_t count) {
        memory.push_back(zeros(count));
        return memory.back().get();
    }

    const float *copy(const float *from, int64_t count) {
        float *to = floats(count);
        std::memcpy(to, from, count * 4);
        return to;
    }

    /* W (width, features) as [features][padded width]. */
    const float *columns(const float *weight, int features) {
        float *to = floats(int64_t(features) * packed.width);
        for (int d = 0; d < packed.sizes.width; ++d)
            for (int f = 0; f < features; ++f)
                to[int64_t(f) * packed.width + d] = weight[int64_t(d) * features + f];
        return to;
    }

    void embeddings(const Tensors &t) {
        const drl_sizes &s = packed.sizes;
        const int D = s.width;
        struct {
            const char *name;
            int features;
            const float **to;
        } const tokens[] = {{"action", s.action_dim, &packed.embed_action},
                            {"return", 1, &packed.embed_return},
                            {"observation", s.observation_dim, &packed.embed_observation}};
        const float *times = t.get("model.embed_timestep.weight", int64_t(s.max_timesteps) * D);
        for (int i = drl::TOKENS - packed.tokens; i < drl::TOKENS; ++i) {
            const std::string name = std::string("model.embed_") + tokens[i].name;
            *tokens[i].to = columns(t.get(name + ".weight", int64_t(D) * tokens[i].features), tokens[i].features);
            const float *bias = t.get(name + ".bias", D);
            float *table = floats(int64_t(s.max_timesteps) * packed.width);
            for (int64_t step = 0; step < s.max_timesteps; ++step)
                for (int d = 0; d < D; ++d) table[step * packed.width + d] = times[step * D + d] + bias[d];
            packed.times[i] = table;
        }
        float *weight = floats(packed.width), *bias = floats(packed.width);
        std::memcpy(weight, t.get("model.norm_embedding.weight", D), 4 * D);
        std::memcpy(bias, t.get("model.norm_embedding.bias", D), 4 * D);
        packed.norm_weight = weight, packed.norm_bias = bias;
        if (t.has("model.return_cap"))
            packed.return_cap = copy(t.get("model.return_cap", s.max_timesteps), s.max_timesteps);
        packed.mean = copy(t.get("normaliser.mean", s.observation_dim), s.observation_dim);
        packed.std = copy(t.get("normaliser.std", s.observation_dim), s.observation_dim);
        for (int i = 0; i < s.observation_dim; ++i)
            if (!(packed.std[i] > 0)) throw std::invalid_argument("normaliser.std is not positive");
        packed.low = copy(t.get("action.low", s.action_dim), s.action_dim);
        packed.high = copy(t.get("action.high", s.action_dim), s.action_dim);
    }

    struct Axis { /* a dimension that is `groups` blocks of `count`, each padded to `stride`, all padded to `total` */
        int groups, count, stride, total;
    };

    /* W (outputs, inputs) of nn.Linear, after a norm whose weight and bias are (inputs,) if given. `outside`: the bias of
     * outputs that are padding. The sums are double, the results rounded once. */
    Product pack(const float *W, const float *b, Axis out, Axis in, const float *norm_weight = nullptr,
                 const float *norm_bias = nullptr, float outside = 0) {
        const int panel = packed.panel, inputs = in.groups * in.count;
        const bool pairs = packed.half;
        float *bias = floats(out.total);
        char *weights = bytes(int64_t(out.total) * in.total * (half_ ? 2 : 4));
        for (int row = 0; row < out.total; ++row) bias[row] = outside;
        for (int group = 0; group < out.groups; ++group)
            for (int i = 0; i < out.count; ++i) {
                const int row = group * out.count + i, to = group * out.stride + i;
                double total = b[row];
                for (int input = 0; input < inputs; ++input) {
                    const float weight = W[int64_t(row) * inputs + input];
                    if (norm_bias) total += double(weight) * norm_bias[input];
                    const float scaled = norm_weight ? weight * norm_weight[input] : weight;
                    const int64_t k = input / in.count * in.stride + input % in.count;
                    const int64_t start = int64_t(to / panel) * in.total * panel, column = to % panel;
                    const int64_t at =
                        start + (pairs ? k / 2 * 2 * panel + 2 * column + k % 2 : k * panel + column);
                    if (half_) reinterpret_cast<uint16_t *>(weights)[at] = half(scaled);
                    else reinterpret_cast<float *>(weights)[at] = scaled;
                }
                bias[to] = float(total);
            }
        return {weights, bias, in.total, out.total / panel};
    }

    /* As Layer says. Rounded once, and bounded: what a step's first key weighs must leave float32 room. */
    const float *fading(const Tensors &t, const std::string &name) {
        const int heads = packed.sizes.heads, tokens = packed.tokens;
        const float *decay = t.has(name) ? t.get(name, heads) : nullptr;
        float *to = floats(int64_t(heads) * (tokens + 1));
        for (int h = 0; h < heads; ++h) {
            const double g = decay ? decay[h] : 1;
            if (!(g > 0 && g <= 1 && std::pow(g, -tokens) < 0x1p101))
                throw std::invalid_argument(name + " is not in (0, 1], or too small");
            for (int s = 1; s <= tokens; ++s) *to++ = float(std::pow(g, -s));
            *to++ = float(std::pow(g, tokens));
        }
        return to - int64_t(heads) * (tokens + 1);
    }

    void pack_layers(const Tensors &t) {
        const drl_sizes &s = packed.sizes;
        const int D = s.width, H = 4 * D, A = s.action_dim;
        const Axis stream{1, D, packed.width, packed.width}, hidden{1, H, packed.hidden, packed.hidden},
            heads{s.heads, D / s.heads, packed.head, packed.heads_width}, action{1, A, packed.actions, packed.actions};
        /* phi of a padded feature must be 0: elu(x) + 1 is where exp(x) is */
        const float outside = s.feature_map == DRL_ELU1 ? -1e30f : 0;
        for (int l = 0; l < s.layers; ++l) {
            const std::string name = "model.blocks." + std::to_string(l) + ".";
            const float *norm = t.get(name + "norm_attention.weight", D), *shift = t.get(name + "norm_attention.bias", D);
            const float *qkv = t.get(name + "attention.qkv.weight", int64_t(3) * D * D);
            const float *bias = t.get(name + "attention.qkv.bias", 3 * D);
            const int64_t part = int64_t(D) * D;
            drl::Layer layer;
            layer.query = pack(qkv, bias, heads, stream, norm, shift, outside);
            layer.key = pack(qkv + part, bias + D, heads, stream, norm, shift, outside);
            layer.value = pack(qkv + 2 * part, bias + 2 * D, heads, stream, norm, shift);
            layer.out = pack(t.get(name + "attention.out.weight", part), t.get(name + "attention.out.bias", D), stream,
                             heads);
            layer.expand = pack(t.get(name + "mlp.0.weight", 4 * part), t.get(name + "mlp.0.bias", H), hidden, stream,
                                t.get(name + "norm_mlp.weight", D), t.get(name + "norm_mlp.bias", D));
            layer.contract = pack(t.get(name + "mlp.2.weight", 4 * part), t.get(name + "mlp.2.bias", D), stream, hidden);
            layer.fading = fading(t, name + "attention.decay");
            layers.push_back(layer);
        }
        packed.layers = layers.data();
        packed.action = pack(t.get("model.head.weight", int64_t(A) * D), t.get("model.head.bias", A), action, stream,
                             t.get("model.norm.weight", D), t.get("model.norm.bias", D));
    }
};

namespace {

/* This thread's working memory, which only ever grows. */
void *workspace(int64_t bytes) {
    static thread_local std::unique_ptr<char, Free> memory;
    static thread_local int64_t size = 0;
    if (size < bytes) memory = zeros(bytes), size = bytes;
    return memory.get();
}

template <class Make> drl_policy *made(char *error, size_t error_size, const Make &make) {
    try {
        return make();
    } catch (const std::exception &problem) {
        if (error && error_size) std::snprintf(error, error_size, "%s", problem.what());
        return nullptr;
    }
}

} // namespace

int drl_abi(void) { return DRL_ABI; }

const char *drl_instruction_sets(void) {
    static const std::string names = [] {
        std::string joined;
        for (const InstructionSet *set : instruction_sets()) joined += (joined.empty() ? "" : " ") + std::string(set->name);
        return joined;
    }();
    return names.c_str();
}

drl_policy *drl_policy_new(const drl_sizes *sizes, const drl_tensor *tensors, int64_t count, int precision,
                           const char *instruction_set, char *error, size_t error_size) {
    return made(error, error_size,
                [&] { return new drl_policy(*sizes, Tensors(tensors, count), precision, instruction_set); });
}

drl_policy *drl_policy_open(const char *file, int precision, char *error, size_t error_size) {
    return made(error, error_size, [&] {
        const drl::File read(file);
        try {
            const Tensors tensors(read.tensors().data(), int64_t(read.tensors().size()));
            drl_policy *policy = new drl_policy(read.sizes(), tensors, precision, nullptr);
            policy->target_return = read.target_return();
            return policy;
        } catch (const std::invalid_argument &problem) {
            throw std::runtime_error(std::string(file) + ": " + problem.what());
        }
    });
}

void drl_policy_free(drl_policy *policy) { delete policy; }
drl_sizes drl_policy_sizes(const drl_policy *policy) { return policy->packed.sizes; }
float drl_policy_target_return(const drl_policy *policy) { return policy->target_return; }
const char *drl_policy_instruction_set(const drl_policy *policy) { return policy->set->name; }
int64_t drl_policy_state_size(const drl_policy *policy) { return policy->packed.state_size; }
int64_t drl_policy_state_head(const drl_policy *policy) { return policy->packed.state_head; }
int64_t drl_policy_state_padded(const drl_policy *policy) { return policy->packed.head; }

void drl_policy_start(const drl_policy *policy, float *state, float target_return) {
    std::memset(state, 0, sizeof(float) * policy->packed.state_size);
    state[0] = state[1] = target_return;
}

int64_t drl_policy_step(const drl_policy *policy, int64_t n, const int64_t *rows, const float *observation,
                        const float *reward, const uint8_t *begins, const float *before, float *after, float *action,
                        int threads) {
    const Packed &packed = policy->packed;
    const int O = packed.sizes.observation_dim, A = packed.sizes.action_dim;
    for (int64_t i = 0; i < n; ++i) {
        if (!finite(observation + i * O, O)) return 1 + i;
        int32_t timestep;
        std::memcpy(&timestep, before + (rows ? rows[i] : i) * packed.state_size + 2, 4);
        if (timestep != 0 && !(begins && begins[i]) && !finite(reward[i])) return -(1 + i);
    }
    threads = std::max(1, threads);
    const int64_t size = std::max<int64_t>(1, std::min<int64_t>((n + threads - 1) / threads, drl::CHUNK));
    const auto work = [&](int64_t chunk) {
        const int64_t start = chunk * size, count = n - start < size ? n - start : size;
        const drl::Task task = {int(count), rows ? rows + start : nullptr, start, observation + start * O,
                                reward + start, begins ? begins + start : nullptr, before, after,
                                action + start * A, workspace(packed.workspace)};
        policy->step(packed, task);
    };
    if (n <= size) work(0);
    else drl::share((n + size - 1) / size, threads, std::ref(work));
    for (int64_t i = 0; i < n; ++i)
        if (!finite(action + i * A, A)) return 1 + n + i;
    return 0;
}
