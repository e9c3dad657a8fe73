// A few threads that run the stages of a forward. Each begins with its own share of a stage's units, so that it knows what
// memory it will read next, and then takes what is left of others' shares: a thread that the system has put aside holds
// nothing up but the unit it is in. Nobody waits for a thread that has nothing to do; a stage ends with its last unit.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace idlm_cpu {

class Pool {
 public:
  using Unit = std::function<void(int stage, int unit, int thread)>;
  using Ahead = std::function<void(int stage, int thread)>;
  struct Stage {
    int units;
    bool is_open = false;  // the next stage begins before this one has ended; its units call `wait` for what they need
  };

  static constexpr int kMostUnits = (1 << 20) - 1;
  // The first unit of a thread's share of n.
  static int share(int n, int thread, int threads) { return (int)((int64_t)n * thread / threads); }
  // Units of stage s run after all of stage s - 1. The caller takes part. A unit must not throw. Each thread calls `ahead`
  // (may be null) when it comes to a stage: for memory that it reads soon.
  void run(const std::vector<Stage>& stages, int threads, const Unit& unit, const Ahead& ahead = nullptr);
  // In a unit of the stage that follows it: until all units of an open stage have ended.
  void wait(int stage) { ended(stage, generation_.load(std::memory_order_relaxed)); }
  Pool() = default;
  ~Pool();
  Pool(const Pool&) = delete;

 private:
  // A share of a stage: generation (24 bits), end (20), next unit (20). A late thread cannot take what is not of its run.
  using Word = std::atomic<uint64_t>;
  void resize(int threads);
  void work(int thread, uint64_t seen);
  void stages(uint64_t generation, int count, int thread);
  bool ended(int stage, uint64_t generation);
  bool claim(Word& share, uint64_t generation, int* unit);

  std::vector<std::thread> threads_;
  int width_ = 1;             // threads of a run, the caller's included
  std::vector<Word> shares_;  // [stage][thread]
  std::vector<Word> done_;    // [stage]: generation (24 bits), units that have ended
  std::vector<std::atomic<bool>> is_open_;  // [stage]
  std::atomic<int> count_{0};
  std::atomic<uint64_t> generation_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int> asleep_{0};
  const Unit* unit_ = nullptr;
  const Ahead* ahead_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace idlm_cpu
