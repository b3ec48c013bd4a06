#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "faulty_source.h"
#include "pass.h"
#include "route.h"

namespace dcext::stress {

/** What all streams of a run share, and what they have come to. */
struct World {
  ReadThreads& threads;
  ThreadPool& pool;
  std::vector<ReadSource*> files;
  int64_t file_nbytes;
  int64_t most_users;  ///< threads that use a stream at the same time

  std::atomic<int64_t> steps{0};  ///< units begun and ended
  std::atomic<int64_t> injected{0}, failed_steps{0}, closed_steps{0}, early_steps{0}, look_ups{0};
  std::atomic<int64_t> streams{0}, closes{0}, left_threads{0};
  std::atomic<int64_t> peak_slots{0};
  std::atomic<int64_t> read_nbytes{0}, used_nbytes{0}, dropped_nbytes{0};
};

/** A stream from its making to its end, with the threads that use it. All choices follow from the seed, but not how
 *  threads take turns. */
class Session {
 public:
  Session(World& world, uint64_t seed);

  void run();

 private:
  struct User {
    Route route;
    fuzz::Random random;
  };

  void make_stream();
  Piece random_piece();
  void spawn(User user);
  void use_stream(User user);
  void step(User* user);
  void look_up(User* user);
  void use(Pass* pass, User* user, bool closed_before);
  void close_when_due();
  void check_statistics() const;

  World& world_;
  fuzz::Random random_;
  const int64_t steps_wanted_, close_at_;
  const bool leave_open_;
  int64_t most_nbytes_;  // of a piece
  std::unique_ptr<GuardedSlots> slots_;
  std::vector<std::unique_ptr<FaultySource>> sources_;
  std::vector<std::vector<Piece>> units_;
  std::unique_ptr<WeightStream> stream_;

  std::atomic<int64_t> steps_{0}, used_nbytes_{0};
  std::atomic<bool> close_begun_{false}, closed_{false};
  std::mutex mutex_;  // guards users_
  std::vector<std::thread> users_;
};

}  // namespace dcext::stress
