#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <chrono>
#include <stdexcept>
#include <system_error>

namespace idlm_cpu {
namespace {

constexpr uint64_t kIndexBits = 20, kIndexMask = Pool::kMostUnits, kGenerationMask = (1u << 24) - 1;
constexpr int kSpins = 200;                                    // before a thread offers its core to others
constexpr auto kAwake = std::chrono::microseconds(2000);       // after a run: the next step follows within that

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void relax(int& spins) {
  if (++spins < kSpins) relax();
  else std::this_thread::yield();
}

// While one lives, this thread rounds to nearest and keeps subnormal numbers, whatever its owner has set: a unit has the same
// bits on every thread.
class PlainFloats {
 public:
#if defined(__x86_64__)
  PlainFloats() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~PlainFloats() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  PlainFloats() {}
#endif
};

}  // namespace

Pool::~Pool() { resize(1); }

void Pool::resize(int threads) {
  if (width_ == threads) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& thread : threads_) thread.join();
  threads_.clear();
  stop_ = false;
  width_ = threads;
  const uint64_t seen = generation_.load();
  try {
    for (int i = 1; i < threads; i++) threads_.emplace_back([this, i, seen] { work(i, seen); });
  } catch (const std::system_error&) {
    // The system gives no more of them: those there are take the shares of the others.
  }
}

void Pool::run(const std::vector<Stage>& all, int threads, const Unit& unit, const Ahead& ahead) {
  for (const Stage& stage : all)
    if (stage.units < 0 || stage.units > kMostUnits) throw std::length_error("there are too many rows for one forward");
  const PlainFloats floats;
  resize(threads);
  const int count = (int)all.size();
  if (shares_.size() < (size_t)count * threads || (int)done_.size() < count) {
    resize(1);  // so that nobody looks at the old ones
    shares_ = std::vector<Word>((size_t)count * threads);
    done_ = std::vector<Word>(count);
    is_open_ = std::vector<std::atomic<bool>>(count);
    resize(threads);
  }
  const uint64_t generation = (generation_.load() + 1) & kGenerationMask;
  // Every word gets the new generation and no units first: a late thread of the last run can take nothing from here on.
  for (Word& share : shares_) share.store(generation << 40);
  for (Word& done : done_) done.store(generation << 40, std::memory_order_relaxed);
  unit_ = &unit, ahead_ = ahead ? &ahead : nullptr;
  count_.store(count);
  for (int s = 0; s < count; s++) {
    is_open_[s].store(all[s].is_open, std::memory_order_relaxed);
    for (int t = 0; t < threads; t++)
      shares_[s * threads + t].store(generation << 40 | (uint64_t)share(all[s].units, t + 1, threads) << kIndexBits | share(all[s].units, t, threads),
                                     std::memory_order_release);
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    generation_.store(generation);
  }
  if (asleep_.load()) wake_.notify_all();
  stages(generation, count, 0);
}

bool Pool::claim(Word& share, uint64_t generation, int* unit) {
  uint64_t word = share.load(std::memory_order_acquire);
  while (word >> 40 == generation && (word & kIndexMask) < (word >> kIndexBits & kIndexMask))
    if (share.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
      *unit = (int)(word & kIndexMask);
      return true;
    }
  return false;
}

// Whether all units of a stage have ended, once they have; false when the run is over.
bool Pool::ended(int stage, uint64_t generation) {
  for (int spins = 0;; relax(spins)) {
    const uint64_t word = done_[stage].load(std::memory_order_acquire);
    if (word >> 40 != generation) return false;
    // The end of the last share is the number of units; the word still belongs to this run if `done` does afterwards.
    const uint64_t last = shares_[(stage + 1) * width_ - 1].load(std::memory_order_acquire);
    if (last >> 40 != generation) return false;
    if ((word & kIndexMask) == (last >> kIndexBits & kIndexMask)) return true;
  }
}

// Runs what it can get of every stage and waits for the rest of it; returns early when the run is over.
void Pool::stages(uint64_t generation, int count, int thread) {
  const int threads = width_;
  for (int s = 0; s < count; s++) {
    bool is_first = true;
    for (int i = 0; i < threads; i++) {
      Word& share = shares_[s * threads + (thread + i) % threads];
      for (int unit; claim(share, generation, &unit);) {
        if (is_first && ahead_) (*ahead_)(s, thread);  // only a claim proves that the run is not over
        is_first = false;
        (*unit_)(s, unit, thread);
        done_[s].fetch_add(1, std::memory_order_release);
      }
    }
    if (!is_open_[s].load(std::memory_order_relaxed) && !ended(s, generation)) return;
  }
}

void Pool::work(int thread, uint64_t seen) {
  const PlainFloats floats;
  for (;;) {
    const auto start = std::chrono::steady_clock::now();
    uint64_t generation = generation_.load(std::memory_order_acquire);
    for (int spins = 0; generation == seen; generation = generation_.load(std::memory_order_acquire)) {
      if (stop_) return;
      relax(spins);
      if (spins % kSpins || std::chrono::steady_clock::now() - start < kAwake) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      asleep_++;
      wake_.wait(lock, [&] { return stop_ || generation_.load() != seen; });
      asleep_--;
    }
    seen = generation;
    stages(generation, count_.load(), thread);
  }
}

}  // namespace idlm_cpu
