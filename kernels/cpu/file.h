/* The model.safetensors of an exported policy: a JSON header that names float32 arrays, then the arrays. */
#ifndef DRL_FILE_H
#define DRL_FILE_H

#include <map>
#include <string>
#include <vector>

#include "drl_policy.h"

namespace drl {

class File {
public:
    /* Raises std::runtime_error, one line, for what is not such a file. */
    explicit File(const char *name);
    const std::vector<drl_tensor> &tensors() const { return tensors_; }
    drl_sizes sizes() const;
    float target_return() const; /* NaN if the file names none */

private:
    std::string name_;
    std::vector<float> numbers_;
    std::vector<std::string> names_;
    std::vector<drl_tensor> tensors_;
    std::map<std::string, std::string> metadata_;
    const std::string &said(const char *key) const;
    int whole(const char *key) const;
    float real(const char *key) const;
};

} // namespace drl

#endif
