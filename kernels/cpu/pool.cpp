#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

#include <unistd.h>

namespace {

struct Job {
    const std::function<void(int64_t)> &work;
    const int64_t parts;
    int seats;       /* for threads that may still join */
    int joined = 0;  /* threads at work, the caller not counted */
    std::atomic<int64_t> next{0};
    std::condition_variable left{};

    void run() {
        for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;) work(part);
    }
};

class Pool {
    const pid_t process_ = getpid();
    const int most_ = std::max(1, int(std::thread::hardware_concurrency())) - 1;
    int threads_ = 0, idle_ = 0;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<Job *> jobs_; /* those that have seats */

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            ++idle_;
            wake_.wait(lock, [this] { return !jobs_.empty(); });
            --idle_;
            Job &job = *jobs_.front();
            ++job.joined;
            if (!--job.seats) jobs_.pop_front();
            lock.unlock();
            job.run();
            lock.lock();
            if (!--job.joined) job.left.notify_one();
        }
    }

    void grow(int wanted) {
        try {
            for (int more = std::min(wanted - idle_, most_ - threads_); more > 0; --more, ++threads_)
                std::thread([this] { serve(); }).detach();
        } catch (const std::system_error &) { /* those that there are must do */
        }
    }

public:
    bool here() const { return getpid() == process_; }

    void share(Job &job) {
        const int seats = job.seats;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            grow(seats);
            jobs_.push_back(&job);
        }
        for (int i = 0; i < seats; ++i) wake_.notify_one();
        job.run();
        std::unique_lock<std::mutex> lock(mutex_);
        if (job.seats) jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
        job.left.wait(lock, [&job] { return !job.joined; });
    }
};

} // namespace

void drl::share(int64_t parts, int threads, const std::function<void(int64_t)> &work) {
    static Pool &pool = *new Pool; /* never ends: its threads sleep in it until the process does */
    Job job{work, parts, int(std::min<int64_t>(threads, parts)) - 1};
    if (job.seats > 0 && pool.here()) pool.share(job);
    else job.run();
}
