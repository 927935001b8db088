#include "pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

struct Job {
    const std::function<void(int64_t)> &work;
    const int64_t parts;
    int seats;      /* for threads that may still join */
    int joined = 0; /* threads at work, the caller not counted */
    std::atomic<int64_t> next{0};
    std::condition_variable left{};

    void run() {
        for (int64_t part; (part = next++) < parts;) work(part);
    }
};

/* Never destroyed: its threads sleep in it until the process ends. */
struct Pool {
    const pid_t process = getpid();
    const int most = std::max(1, int(std::thread::hardware_concurrency())) - 1;
    int made = 0, idle = 0;
    std::mutex mutex;
    std::condition_variable wake;
    std::deque<Job *> jobs; /* those that have seats */

    void serve() {
        for (std::unique_lock<std::mutex> lock(mutex);;) {
            ++idle;
            wake.wait(lock, [this] { return !jobs.empty(); });
            --idle;
            Job &job = *jobs.front();
            ++job.joined;
            if (!--job.seats) jobs.pop_front();
            lock.unlock();
            job.run();
            lock.lock();
            if (!--job.joined) job.left.notify_one();
        }
    }

    void share(Job &job) {
        const int seats = job.seats;
        std::unique_lock<std::mutex> lock(mutex);
        try {
            for (int more = std::min(seats - idle, most - made); more > 0; --more, ++made)
                std::thread([this] { serve(); }).detach();
        } catch (const std::system_error &) { /* those that there are must do */
        }
        jobs.push_back(&job);
        lock.unlock();
        for (int i = 0; i < seats; ++i) wake.notify_one();
        job.run();
        lock.lock();
        if (job.seats) jobs.erase(std::find(jobs.begin(), jobs.end(), &job));
        job.left.wait(lock, [&job] { return !job.joined; });
    }
};

} // namespace

void drl::share(int64_t parts, int threads, const std::function<void(int64_t)> &work) {
    static Pool &pool = *new Pool;
    Job job{work, parts, int(std::min<int64_t>(threads, parts)) - 1};
    if (job.seats > 0 && getpid() == pool.process) pool.share(job);
    else job.run();
}
