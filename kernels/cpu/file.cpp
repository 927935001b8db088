#include "file.h"

#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <locale>
#include <memory>
#include <sstream>
#include <stdexcept>

namespace drl {
namespace {

constexpr uint64_t LONGEST_HEADER = 1 << 24; /* bytes */

struct Entry {
    std::string dtype;
    std::vector<uint64_t> shape, offsets;
};

/* Reads the JSON that safetensors allows in its header and nothing else. */
class Header {
public:
    std::map<std::string, Entry> entries;
    std::map<std::string, std::string> metadata;

    explicit Header(const std::string &text) : text_(text) {
        object([this](const std::string &key) {
            if (key == "__metadata__") object([this](const std::string &name) { metadata[name] = quoted(); });
            else entry(entries[key]);
        });
        blank();
        if (at_ != text_.size()) fail();
    }

private:
    const std::string &text_;
    size_t at_ = 0;

    [[noreturn]] static void fail() { throw std::runtime_error("its header is damaged"); }

    void blank() {
        while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
            ++at_;
    }

    bool next(char wanted) {
        blank();
        if (at_ >= text_.size() || text_[at_] != wanted) return false;
        ++at_;
        return true;
    }

    void expect(char wanted) {
        if (!next(wanted)) fail();
    }

    /* A string; of escapes those of one character. */
    std::string quoted() {
        expect('"');
        std::string value;
        while (at_ < text_.size() && text_[at_] != '"') {
            if (text_[at_] == '\\' && (++at_ >= text_.size() || !std::strchr("\"\\/bfnrtu", text_[at_]))) fail();
            value += text_[at_++];
        }
        if (at_ >= text_.size()) fail();
        ++at_;
        return value;
    }

    uint64_t number() {
        blank();
        uint64_t value = 0;
        const size_t start = at_;
        while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9' && at_ - start < 18)
            value = 10 * value + uint64_t(text_[at_++] - '0');
        if (at_ == start) fail();
        return value;
    }

    std::vector<uint64_t> numbers() {
        std::vector<uint64_t> values;
        expect('[');
        if (next(']')) return values;
        do values.push_back(number());
        while (next(','));
        expect(']');
        return values;
    }

    template <class Member> void object(const Member &member) {
        expect('{');
        if (next('}')) return;
        do {
            const std::string key = quoted();
            expect(':');
            member(key);
        } while (next(','));
        expect('}');
    }

    void entry(Entry &entry) {
        object([&](const std::string &key) {
            if (key == "dtype") entry.dtype = quoted();
            else if (key == "shape") entry.shape = numbers();
            else if (key == "data_offsets") entry.offsets = numbers();
            else fail();
        });
    }
};

struct Close {
    void operator()(std::FILE *file) const { std::fclose(file); }
};

} // namespace

File::File(const char *name) : name_(name) {
    const auto refuse = [this](const std::string &why) { throw std::runtime_error(name_ + ": " + why); };
    const std::unique_ptr<std::FILE, Close> file(std::fopen(name, "rb"));
    if (!file) refuse("cannot be opened; export a policy by: drl export RUN policy/");
    if (std::fseek(file.get(), 0, SEEK_END)) refuse("is no regular file");
    const long end = std::ftell(file.get());
    if (end < 8 || end == LONG_MAX || std::fseek(file.get(), 0, SEEK_SET)) refuse("is no safetensors file");
    unsigned char length[8];
    if (std::fread(length, 1, 8, file.get()) != 8) refuse("cannot be read");
    uint64_t header_size = 0;
    for (int i = 7; i >= 0; --i) header_size = header_size << 8 | length[i];
    if (header_size > LONGEST_HEADER || header_size > uint64_t(end) - 8) refuse("is no safetensors file");
    std::string text(header_size, '\0');
    if (std::fread(&text[0], 1, header_size, file.get()) != header_size) refuse("cannot be read");
    const uint64_t size = uint64_t(end) - 8 - header_size;
    if (size % 4) refuse("is truncated or damaged");
    numbers_.resize(size / 4);
    if (std::fread(numbers_.data(), 4, numbers_.size(), file.get()) != numbers_.size()) refuse("cannot be read");
    try {
        const Header header(text);
        metadata_ = header.metadata;
        names_.reserve(header.entries.size()); /* the tensors point at the names */
        uint64_t used = 0;
        for (const auto &[key, entry] : header.entries) {
            uint64_t count = 1;
            for (uint64_t dimension : entry.shape)
                if ((count *= dimension) > size || dimension > size) throw std::runtime_error(key + " is too large");
            if (entry.dtype != "F32") throw std::runtime_error(key + " is " + entry.dtype + ", expected F32");
            if (entry.offsets.size() != 2 || entry.offsets[0] % 4 || entry.offsets[1] > size ||
                entry.offsets[0] > entry.offsets[1] || entry.offsets[1] - entry.offsets[0] != 4 * count)
                throw std::runtime_error(key + " does not lie where the header says");
            names_.push_back(key);
            tensors_.push_back({names_.back().c_str(), numbers_.data() + entry.offsets[0] / 4, int64_t(count)});
            used += 4 * count;
        }
        if (used != size) throw std::runtime_error("is truncated or damaged");
    } catch (const std::runtime_error &problem) {
        refuse(problem.what());
    }
    /* 2: a memory that fades, or steps of two tokens, of which earlier libraries do not know */
    if (said("format") != "1" && said("format") != "2")
        refuse("has format " + said("format") + ", this library reads 1 and 2");
}

const std::string &File::said(const char *key) const {
    const auto found = metadata_.find(key);
    if (found == metadata_.end())
        throw std::runtime_error(name_ + ": says no " + key + "; export the policy by: drl export RUN policy/");
    return found->second;
}

int File::whole(const char *key) const {
    const std::string &text = said(key);
    if (text.empty() || text.size() > 9 || text.find_first_not_of("0123456789") != std::string::npos)
        throw std::runtime_error(name_ + ": " + key + " is no whole number: " + text.substr(0, 40));
    return std::atoi(text.c_str());
}

float File::real(const char *key) const {
    const std::string &text = said(key);
    std::istringstream stream(text);
    stream.imbue(std::locale::classic()); /* strtof would want the decimal comma of the program's locale */
    float value;
    if (!(stream >> value) || !stream.eof() || !std::isfinite(value))
        throw std::runtime_error(name_ + ": " + key + " is no number: " + text.substr(0, 40));
    return value;
}

drl_sizes File::sizes() const {
    static const char *const maps[] = {"elu1", "relu", "identity"};
    const std::string &map = said("feature_map");
    int feature_map = 0;
    while (feature_map < 3 && map != maps[feature_map]) ++feature_map;
    return {whole("observation_dim"), whole("action_dim"), whole("width"), whole("layers"), whole("heads"),
            whole("max_timesteps"), feature_map, real("return_scale")};
}

float File::target_return() const { return metadata_.count("target_return") ? real("target_return") : NAN; }

} // namespace drl
