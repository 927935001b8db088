/* Threads that share the parts of a call and sleep when there is none. OpenMP's spin between calls, and take the cores
 * from whoever works meanwhile: the physics of a roll-out. */
#pragma once

#include <cstdint>
#include <functional>

namespace drl {

/* work(0) ... work(parts - 1), each once, on this thread and on up to threads - 1 others that are idle. May be called by
 * several threads at once. A child of fork() has this thread alone. */
void share(int64_t parts, int threads, const std::function<void(int64_t)> &work);

} // namespace drl
