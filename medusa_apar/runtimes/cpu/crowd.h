// How many threads a step takes while other processes hold the cores too.
//
// A step's threads meet some 270 times. Where another process has one's core for a turn of the scheduler, 4 ms, all of
// them wait: beside one busy process two threads take 3.7 times as long as alone, and one thread 1.9 times (a step of
// 9 ms, two cores, `python -m medusa_apar.eval.rows`). So a team whose threads wait for their cores shrinks by those that
// do, where fewer would be sooner done, and now and then some steps try whether the cores are free again. A row's bits do
// not depend on the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <ctime>
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
        // A thread that has slept may wake on the core of the one that woke it, and wait there until it is moved.
        if (++in_a_row_ < PATIENCE) return;
        most_ = std::max(1, team - waiting);
        again_ = now + pause_;
        pause_ = std::min(2 * pause_, LONGEST_PAUSE);
        in_a_row_ = 0;
    }

   private:
    static constexpr std::chrono::milliseconds FIRST_PAUSE{200}, LONGEST_PAUSE{3200};  // between two tries
    static constexpr int PATIENCE = 3;  // steps, each of which says the same
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

// How long the calling thread has run, in nanoseconds.
inline uint64_t ran() {
    timespec now;
    return clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now) ? 0 : now.tv_sec * 1000000000ull + now.tv_nsec;
}

// Watches one step. Every thread of its team says when it begins and ends its part.
class Watch {
   public:
    explicit Watch(int threads) : threads_(threads), team(crowd().team_of(threads)) {}
    ~Watch() {
        const auto now = Crowd::Clock::now();
        crowd().saw(team, threads_, too_many(team, waiting_, ran_, (now - started_).count()), now);
    }
    void began() {
        waited().passed();
        begin() = ran();
    }
    void ended() {
        const std::chrono::nanoseconds wait(waited().passed()), took = Crowd::Clock::now() - started_;
        ran_ += ran() - begin();
        if (wait > took / 4) waiting_++;
    }

    // How many threads to drop: those that waited for cores, if the rest alone would have been sooner done, else none.
    // A server's own threads hold a core for a moment after each step, for which no team should shrink. `ran`, of all
    // threads, has what they spun at their barriers (`Barrier`), so that a team is rather kept.
    static int too_many(int team, int waiting, uint64_t ran, uint64_t took) {
        return ran / std::max(1, team - waiting) < took ? waiting : 0;
    }

   private:
    static Waited& waited() {
        static thread_local Waited here;
        return here;
    }
    static uint64_t& begin() {
        static thread_local uint64_t here;
        return here;
    }
    const int threads_;
    const Crowd::Clock::time_point started_ = Crowd::Clock::now();
    std::atomic<int> waiting_{0};
    std::atomic<uint64_t> ran_{0};

   public:
    const int team;
};

}  // namespace mapar
