#include "cases.h"

#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <ctime>
#include <future>
#include <thread>

#include "faulty_source.h"
#include "pattern_file.h"
#include "watchdog.h"

namespace dcext::stress {
namespace {

constexpr int64_t kNbytes = 1000;           // of a piece
constexpr int64_t kMostIdleNs = 2'000'000;  // of CPU time, in a second

// A stream of units of `num_pieces` pieces, its slots and threads.
struct Fixture {
  std::unique_ptr<DirectFile> file = open_pattern_file(".", 1 << 20, PageCache::kKeep);
  GuardedSlots slots;
  FaultySource source;
  ReadThreads threads{4};
  WeightStream stream;

  Fixture(int64_t num_slots, int64_t num_units, int64_t num_pieces)
      : slots(num_slots, 12288),
        source(*file, slots, {}, 1),
        stream(units(num_units, num_pieces), slots.memory(), threads) {}

  std::vector<std::vector<Piece>> units(int64_t num_units, int64_t num_pieces) {
    std::vector<std::vector<Piece>> units(num_units);
    for (int64_t i = 0; i < num_units * num_pieces; ++i) {
      units[i / num_pieces].push_back({&source, i * kNbytes, kNbytes});
    }
    return units;
  }

  // Returns when at least that many pieces lie in slots and are not used.
  void await_ready(int64_t pieces) const {
    for (;;) {
      const StreamStatistics s = stream.statistics();
      if (s.read_nbytes - s.used_nbytes - s.dropped_nbytes >= pieces * kNbytes) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

  void use_piece(const std::shared_ptr<WeightStream::Use>& use, int64_t index, int64_t offset) {
    const uint8_t* data;
    const Doing doing("wait", &stream, -1, index);
    if (!stream.wait(*use, index, &data).ok()) stop("a piece that cannot be read");
    if (!matches_pattern(data, offset, kNbytes)) stop("wrong bytes");
    stream.release(*use, index);
  }
};

// All slots are full of what was begun first and is not waited for yet: its thread may be about to queue for the pool
// that the second one's works in.
void begun_use_gives_way(int64_t num_slots) {
  Fixture f(num_slots, 3, 6);
  const auto first = f.stream.begin(0);
  f.await_ready(num_slots);
  const auto second = f.stream.begin(1);
  for (int64_t i = 0; i < 6; ++i) f.use_piece(second, i, (6 + i) * kNbytes);
  f.stream.end(second);
  for (int64_t i = 0; i < 6; ++i) f.use_piece(first, i, i * kNbytes);
  f.stream.end(first);
}

// Who fails leaves out pieces that come before one that another thread waits for already.
void skipped_pieces_give_way(int64_t num_slots) {
  Fixture f(num_slots, 1, 6);
  const auto use = f.stream.begin(0);
  f.await_ready(num_slots);
  for (const int64_t i : {5, 4, 0, 3}) f.use_piece(use, i, i * kNbytes);
  f.stream.end(use);
}

// A second user waits for the only slot when its holder ends, without having released it, or closes the stream.
void waiting_user_goes_on(bool closes) {
  Fixture f(1, 2, 1);
  const auto first = f.stream.begin(0);
  const uint8_t* data;
  if (!f.stream.wait(*first, 0, &data).ok()) stop("a piece that cannot be read");
  const int64_t stalls = f.stream.statistics().stalls;
  const auto second = f.stream.begin_some(1, {0});
  std::thread other([&] {
    const uint8_t* other_data;
    const Doing doing(closes ? "wait until it is closed" : "wait for a slot", &f.stream, 1, 0);
    const Status status = f.stream.wait(*second, 0, &other_data).status;
    if (status != (closes ? Status::kClosed : Status::kOk)) stop("a wait that ends otherwise");
  });
  while (f.stream.statistics().stalls == stalls) std::this_thread::yield();
  if (closes) {
    f.stream.close();
  } else {
    f.stream.end(first);
  }
  other.join();
  f.stream.end(second);
  if (closes) f.stream.end(first);
}

int64_t cpu_ns() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return time.tv_sec * int64_t{1000000000} + time.tv_nsec;
}

void expect_idle(const char* what) {
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  const int64_t before = cpu_ns();
  std::this_thread::sleep_for(std::chrono::seconds(1));
  const int64_t ns = cpu_ns() - before;
  std::printf("%s: %" PRId64 " ns\n", what, ns);
  if (ns > kMostIdleNs) stop("an idle stream that takes CPU time: %s", what);
}

void idle_with_a_waiting_user() {
  Fixture f(1, 2, 3);
  const auto use = f.stream.begin(0);
  const uint8_t* data;
  if (!f.stream.wait(*use, 0, &data).ok()) stop("a piece that cannot be read");
  std::thread other([&] {
    const auto use = f.stream.begin(1);
    for (int64_t i = 0; i < 3; ++i) f.use_piece(use, i, (3 + i) * kNbytes);
    f.stream.end(use);
  });
  expect_idle("waiting for a slot");
  f.stream.end(use);
  other.join();
}

// Reads nothing until it is told to.
class ShutSource final : public ReadSource {
 public:
  Failure read(int64_t, int64_t, uint8_t*, const uint8_t**) override {
    opened_.get_future().wait();
    return {Status::kReadError, "shut", -1, 0, 0};
  }
  void open() { opened_.set_value(); }

 private:
  std::promise<void> opened_;
};

void idle_with_a_read_under_way() {
  ShutSource source;
  GuardedSlots slots(2, 12288);
  ReadThreads threads(2);
  WeightStream stream({{{&source, 0, kNbytes}}}, slots.memory(), threads);
  const auto use = stream.begin_some(0, {0});
  const uint8_t* data;
  std::thread user([&] {
    if (stream.wait(*use, 0, &data).ok()) stop("a read that must fail");
  });
  expect_idle("waiting for a read");
  const StreamStatistics statistics = stream.statistics();
  if (std::min(statistics.reading_ns, statistics.stall_ns) < 1'000'000'000) {
    stop("a second of a read and a wait under way that is not counted");
  }
  source.open();
  user.join();
  stream.end(use);
}

}  // namespace

int run_cases() {
  std::atomic<int64_t> done{0};
  const Watchdog watchdog(done, 10);
  for (const int64_t num_slots : {1, 2, 5}) {
    begun_use_gives_way(num_slots);
    ++done;
    skipped_pieces_give_way(num_slots);
    ++done;
  }
  for (const bool closes : {false, true}) {
    waiting_user_goes_on(closes);
    ++done;
  }
  std::printf("%ld cases\n", static_cast<long>(done));
  return 0;
}

int run_idle() {
  {
    Fixture f(8, 3, 6);
    const auto use = f.stream.begin(0);
    for (int64_t i = 0; i < 6; ++i) f.use_piece(use, i, i * kNbytes);
    f.stream.end(use);
    f.await_ready(7);  // for a single free slot of eight nobody is woken
    expect_idle("prefetched");
  }
  idle_with_a_waiting_user();
  idle_with_a_read_under_way();
  return 0;
}

}  // namespace dcext::stress
