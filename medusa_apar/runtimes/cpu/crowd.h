// How many threads a step takes while other processes hold the cores too.
//
// A step's threads meet some 270 times. Where another process has one's core for a turn of the scheduler, 4 ms, all of
// them wait: beside one busy process two threads take 3.7 times as long as alone, and one thread 1.9 times (a step of
// 9 ms, two cores, `python -m medusa_apar.eval.rows`). So a team whose threads wait for their cores shrinks by those that do, and now and then a step tries
// whether the cores are free again. A row's bits do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#if defined(__linux__)
#include <fcntl.h>
#include <unistd.h>
#endif

namespace mapar {

// How long the calling thread has been ready to run without a core, in nanoseconds; always 0 where nobody tells.
class Waited {
   public:
#if defined(__linux__)
    Waited() : file_(open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC)), last_(total()) {}
    ~Waited() {
        if (file_ >= 0) close(file_);
    }
    // Since it was asked last.
    uint64_t passed() {
        const uint64_t before = last_;
        last_ = total();
        return last_ - before;
    }

   private:
    uint64_t total() const {
        char text[96];
        const ssize_t size = file_ < 0 ? -1 : pread(file_, text, sizeof text - 1, 0);
        if (size <= 0) return 0;
        text[size] = 0;
        char* rest;
        strtoull(text, &rest, 10);  // how long it has run
        return strtoull(rest, nullptr, 10);
    }
    int file_;
    uint64_t last_;
#else
    uint64_t passed() { return 0; }
#endif
};

class Crowd {
   public:
    using Clock = std::chrono::steady_clock;

    // How many of so many threads a team should have now.
    int team_of(int threads) const { return std::min(threads, most_.load(std::memory_order_relaxed)); }

    // What a step tells, of `team` threads out of `threads`, by how many of them waited for much of its time.
    void saw(int team, int threads, int waiting, Clock::time_point now) {
        const std::unique_lock<std::mutex> alone(lock_, std::try_to_lock);
        if (!alone.owns_lock()) return;  // another engine's step tells the same
        if (team < threads) {
            if (now >= again_) most_ = INT_MAX;  // the next step tries
            return;
        }
        if (!waiting || team == 1) {
            in_a_row_ = 0;
            if (now >= again_ + pause_) pause_ = FIRST_PAUSE;
            return;
        }
        // One may be chance; but whoever has just tried knows.
        if (++in_a_row_ < 2 && pause_ == FIRST_PAUSE) return;
        most_ = std::max(1, team - waiting);
        again_ = now + pause_;
        pause_ = std::min(2 * pause_, LONGEST_PAUSE);
        in_a_row_ = 0;
    }

   private:
    static constexpr std::chrono::milliseconds FIRST_PAUSE{200}, LONGEST_PAUSE{3200};  // between two tries
    std::mutex lock_;
    std::atomic<int> most_{INT_MAX};
    int in_a_row_ = 0;
    std::chrono::milliseconds pause_ = FIRST_PAUSE;
    Clock::time_point again_{};
};

inline Crowd& crowd() {
    static Crowd here;
    return here;
}

// Watches one step. Every thread of its team says when it has ended its part.
class Watch {
   public:
    explicit Watch(int threads) : threads_(threads), team(crowd().team_of(threads)) {}
    ~Watch() { crowd().saw(team, threads_, waiting_, Crowd::Clock::now()); }
    void ended() {
        static thread_local Waited waited;
        const std::chrono::nanoseconds wait(waited.passed()), took = Crowd::Clock::now() - started_;
        if (wait > took / 4) waiting_++;
    }

   private:
    const int threads_;
    const Crowd::Clock::time_point started_ = Crowd::Clock::now();
    std::atomic<int> waiting_{0};

   public:
    const int team;
};

}  // namespace mapar
