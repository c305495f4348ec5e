// What the threads of one parallel region share: who does what, where they meet, what the time went into.
#pragma once

#include <omp.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <thread>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mapar {

// A step meets some 270 times, mostly for a microsecond: OpenMP's own barrier would do, were the cores ours alone. Where
// another process holds one of them, whoever spins keeps its partner waiting for a slice of the scheduler, 2 s a step
// instead of 50 ms. So we spin briefly and then sleep, and a thread that is woken takes its core at once.
class Barrier {
   public:
    void wait() {
        const int threads = omp_get_num_threads();
        if (threads == 1) return;
        const int32_t here = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(here + 1);
            if (sleeping_.load()) wake();
            return;
        }
        for (int i = 0; i < SPINS; i++) {
            if (round_.load(std::memory_order_acquire) != here) return;
            pause();
        }
        sleeping_.fetch_add(1);
        while (round_.load() == here) sleep(here);
        sleeping_.fetch_sub(1);
    }

   private:
    static constexpr int SPINS = 1500;  // some 20 microseconds

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("isb");
#endif
    }
#if defined(__linux__)
    void sleep(int32_t value) { syscall(SYS_futex, &round_, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0); }
    void wake() { syscall(SYS_futex, &round_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
#else
    void sleep(int32_t) { std::this_thread::yield(); }
    void wake() {}
#endif
    std::atomic<int32_t> round_{0};
    std::atomic<int> arrived_{0}, sleeping_{0};
};

struct Share {
    int first, last;
};

// This thread's part of so many equal pieces.
inline Share share(int count) {
    const int threads = omp_get_num_threads(), me = omp_get_thread_num();
    return {(int)((int64_t)count * me / threads), (int)((int64_t)count * (me + 1) / threads)};
}

// Adds up, in the first thread, what passes between two calls.
struct Clock {
    double* seconds;
    std::chrono::steady_clock::time_point last = std::chrono::steady_clock::now();
    void end(int phase) {
        if (!seconds || omp_get_thread_num()) return;
        const auto now = std::chrono::steady_clock::now();
        seconds[phase] += std::chrono::duration<double>(now - last).count();
        last = now;
    }
};

}  // namespace mapar
