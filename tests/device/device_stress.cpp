// Stresses the device stream over threads that stand for a device: every kernel looks at all bytes of its slot while it
// runs, delays and failures are drawn, and sanitizers watch the order of all accesses.
//
//   device_stress eager|captures|exact ROUNDS STEPS SEED host|cuda
//
// The last says which link: that of the host, or that of CUDA over an emulated runtime.
//
// Prints one line of counts; exit status 1 where bytes or counts are wrong.

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

#include "capture_link.h"
#include "codec/payload_encoder.h"
#include "cuda/cuda_link.h"
#include "cudart.h"
#include "runtime/device_stream.h"
#include "runtime/memory.h"
#include "runtime/thread_pool.h"

namespace dcext {
namespace {

// Small generators whose neighbouring seeds have nothing in common (the finalizer of SplitMix64).
struct Random : std::minstd_rand {
  explicit Random(uint64_t seed) : std::minstd_rand(mixed(seed)) {}

  static result_type mixed(uint64_t x) {
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return static_cast<result_type>((x ^ (x >> 31)) >> 33);
  }
};

[[noreturn]] void fail(const std::string& text) {
  std::fprintf(stderr, "device_stress: %s\n", text.c_str());
  std::exit(1);
}

void check(bool holds, const char* text) {
  if (!holds) fail(text);
}

int64_t draw(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

bool chance(Random& random, double probability) {
  return std::uniform_real_distribution<>()(random) < probability;
}

void pause(Random& random) {
  switch (draw(random, 0, 15)) {
    case 0: return std::this_thread::sleep_for(std::chrono::microseconds(draw(random, 1, 60)));
    case 1:
    case 2: return std::this_thread::yield();
    default: return;
  }
}

// Delays copies, and refuses some calls.
class ShakyLink final : public CaptureLink {
 public:
  explicit ShakyLink(unsigned seed) : random_(seed) {}

  std::atomic<double> copy_failures{0}, other_failures{0};
  std::atomic<int64_t> refused{0};

  Failure copy(void* dst, const void* src, int64_t nbytes, Stream stream) override {
    if (refuses(copy_failures)) return refusal();
    const auto seed = static_cast<unsigned>(next());
    enqueue(stream, [seed] {
      Random random(seed);
      pause(random);
    });
    return CaptureLink::copy(dst, src, nbytes, stream);
  }
  Failure record(Event event, Stream stream) override {
    return refuses(other_failures) ? refusal() : CaptureLink::record(event, stream);
  }
  Failure wait(Stream stream, Event event) override {
    return refuses(other_failures) ? refusal() : CaptureLink::wait(stream, event);
  }

 private:
  static Failure refusal() { return {Status::kDeviceError, "drawn", -1, 0, 99}; }
  uint64_t next() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return random_();
  }
  bool refuses(double probability) {
    if (probability == 0) return false;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!chance(random_, probability)) return false;
    ++refused;
    return true;
  }

  std::mutex mutex_;
  Random random_;
};

// A file in memory, slow and unreliable.
class ShakySource final : public ReadSource {
 public:
  explicit ShakySource(double failures) : failures_(failures) {}

  std::vector<uint8_t> bytes;

  Failure read(int64_t offset, int64_t nbytes, uint8_t* dst, const uint8_t** data) override {
    thread_local Random random(std::hash<std::thread::id>()(std::this_thread::get_id()));
    pause(random);
    if (chance(random, failures_)) return {Status::kReadError, "drawn", -1, 0, 5};
    std::memcpy(dst + offset % 4096, bytes.data() + offset, static_cast<size_t>(nbytes));
    *data = dst + offset % 4096;
    return {};
  }

 private:
  const double failures_;
};

enum class Kinds { kHost, kAll };

// Units and all that they borrow.
struct Model {
  std::vector<std::vector<uint8_t>> expected;  // bytes of each unit's slot
  std::vector<DeviceUnit> units;
  std::vector<std::vector<uint8_t>> payloads;
  ShakySource source;
  ReadThreads threads{2};
  std::vector<uint8_t*> slot_memory;
  std::unique_ptr<WeightStream> disk;
  std::vector<uint8_t> ring;
  ThreadPool pool{2};
  PoolExecutor executor{pool, 2};
  int64_t slot_nbytes = 0;

  Model(Random& random, int64_t num_units, Kinds kinds, double failures) : source(failures) {
    std::vector<std::vector<Piece>> disk_units;
    units.resize(static_cast<size_t>(num_units));
    for (int64_t i = 0; i < num_units; ++i) {
      const int64_t kind = kinds == Kinds::kHost ? 0 : draw(random, 0, 3);
      std::vector<uint8_t> bytes(static_cast<size_t>(draw(random, 1, 24) * 64));
      for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(draw(random, 0, 6));
      expected.push_back(std::move(bytes));
      if (kind <= 1) rest_in_host_memory(i);
      if (kind == 2) rest_coded(i, random);
      if (kind == 3) rest_on_disk(i, &disk_units);
    }
    for (const auto& bytes : expected) {
      slot_nbytes = std::max(slot_nbytes, static_cast<int64_t>(bytes.size()));
    }
    if (!disk_units.empty()) open_disk(std::move(disk_units), draw(random, 1, 4));
    ring.resize(static_cast<size_t>(2 * slot_nbytes));
  }

  ~Model() {
    disk.reset();
    if (slots.data != nullptr) free_weights(slots.data, slots.slot_nbytes * slots.num_slots);
  }

  DecodeRing decode_ring() { return {ring.data(), slot_nbytes, 2, &executor}; }

 private:
  SlotMemory slots;

  void rest_in_host_memory(int64_t unit) {
    const auto& bytes = expected[unit];
    const auto half = static_cast<int64_t>(bytes.size()) / 2;
    units[unit].host = {{bytes.data(), half, 0},
                        {bytes.data() + half, static_cast<int64_t>(bytes.size()) - half, half}};
  }

  void rest_coded(int64_t unit, Random& random) {
    const auto nbytes = static_cast<int64_t>(expected[unit].size());
    const int64_t cols = int64_t{16} << draw(random, 0, 2);
    std::vector<uint8_t> payload;
    const auto* weights = reinterpret_cast<const int8_t*>(expected[unit].data());
    const CodecChoice choice{chance(random, 0.5) ? Codec::kZstd : Codec::kRaw, 0};
    const Status status = encode_payload(weights, plan_layout(nbytes / cols, cols, 0, choice),
                                         executor, [&](uint64_t size) {
                                           payload.resize(size);
                                           return payload.data();
                                         });
    check(status == Status::kOk, "encoding failed");
    payloads.push_back(std::move(payload));
    PayloadView view;
    check(PayloadView::parse(payloads.back().data(), payloads.back().size(), &view).ok(),
          "parsing failed");
    units[unit].decoded = {{view, 0}};
  }

  // Its first bytes rest in host memory, as a seek index does.
  void rest_on_disk(int64_t unit, std::vector<std::vector<Piece>>* disk_units) {
    const auto& bytes = expected[unit];
    const auto nbytes = static_cast<int64_t>(bytes.size());
    units[unit].host = {{bytes.data(), 48, 0}};
    units[unit].disk_unit = static_cast<int64_t>(disk_units->size());
    disk_units->emplace_back();
    for (int64_t begin = 48; begin < nbytes; begin += 300) {
      const int64_t offset = static_cast<int64_t>(source.bytes.size());
      const int64_t size = std::min<int64_t>(300, nbytes - begin);
      source.bytes.insert(source.bytes.end(), bytes.begin() + begin, bytes.begin() + begin + size);
      disk_units->back().push_back({&source, offset, size});
      units[unit].disk_offsets.push_back(begin);
    }
  }

  void open_disk(std::vector<std::vector<Piece>> disk_units, int64_t num_slots) {
    slots = {nullptr, 4096 + ReadSource::kSlackNbytes, num_slots};
    slots.data = allocate_weights(slots.slot_nbytes * num_slots);
    disk = std::make_unique<WeightStream>(std::move(disk_units), slots, threads);
    for (DeviceUnit& unit : units) {
      if (!unit.disk_offsets.empty()) unit.disk = disk.get();
    }
  }
};

struct Counts {
  std::atomic<int64_t> begins{0}, kernels{0}, failures{0}, closes{0}, replays{0}, hits{0}, late{0};
};

// The order of a user: a walk through the list, from which it departs now and then.
class Walk {
 public:
  Walk(Random& random, int64_t num_units) : random_(random), order_(num_units) {
    for (int64_t i = 0; i < num_units; ++i) order_[i] = i;
    if (chance(random_, 0.4)) std::shuffle(order_.begin(), order_.end(), random_);
  }

  int64_t next() {
    if (chance(random_, 0.02)) std::shuffle(order_.begin(), order_.end(), random_);
    if (chance(random_, 0.05)) at_ = draw(random_, 0, static_cast<int64_t>(order_.size()) - 1);
    at_ = (at_ + 1) % order_.size();
    return order_[at_];
  }

 private:
  Random& random_;
  std::vector<int64_t> order_;
  size_t at_ = 0;
};

bool with_cuda = false;  // set once, before any thread

// One round: a model, slots, a stream, and those who use it.
struct Round {
  Random random;
  ShakyLink link;
  std::unique_ptr<Link> cuda;
  Model model;
  std::vector<uint8_t> memory;  // the device's
  std::unique_ptr<DeviceStream> stream;
  Counts& counts;

  Round(unsigned seed, Kinds kinds, bool failures, Counts& the_counts)
      : random(seed),
        link(seed),
        model(random, draw(random, 1, 12), kinds, failures ? 0.01 : 0),
        counts(the_counts) {
    if (!with_cuda) return;
    set_emulated_device(&link);
    check(make_cuda_link(kEmulatedDevice, &cuda).ok(), "no link");
  }

  ~Round() {
    const DeviceStreamStatistics statistics = stream->statistics();
    counts.begins += statistics.begins;
    counts.hits += statistics.hits;
    counts.late += statistics.late;
    stream.reset();
    if (!with_cuda) return;
    for (auto& bytes : model.expected) cuda->unpin(bytes.data());
    check(num_registered() == 0, "memory stays pinned");
  }

  void open(int64_t num_slots, const DeviceStreamOptions& options) {
    memory.resize(static_cast<size_t>(num_slots * model.slot_nbytes));
    DeviceSlots slots{{}, model.slot_nbytes};
    for (int64_t i = 0; i < num_slots; ++i) {
      slots.data.push_back(memory.data() + i * model.slot_nbytes);
    }
    Link& used = with_cuda ? *cuda : link;
    if (with_cuda) {
      for (auto& bytes : model.expected) {
        check(cuda->pin(bytes.data(), static_cast<int64_t>(bytes.size())).ok(), "not pinned");
      }
    }
    const Failure failure =
        DeviceStream::create(used, model.units, slots, model.decode_ring(), options, &stream);
    check(failure.ok(), failure.field);
  }

  // What reads a unit, twice, with time between.
  void launch(int64_t unit, const uint8_t* address, Link::Stream consumer, unsigned seed) {
    check(address == stream->address(unit), "a unit is not where it belongs");
    const std::vector<uint8_t>& expected = model.expected[unit];
    link.enqueue(consumer, [this, &expected, address, seed] {
      Random delays(seed);
      for (int pass = 0; pass < 2; ++pass) {
        check(std::memcmp(address, expected.data(), expected.size()) == 0,
              "a kernel saw bytes that are not its unit's");
        pause(delays);
      }
      ++counts.kernels;
    });
  }

  /** @return whether it was begun; what else may happen is counted. */
  bool begin(int64_t unit, Link::Stream consumer, Random& delays, bool* is_closed) {
    uint8_t* address;
    const Failure failure = stream->begin(unit, consumer, &address);
    if (failure.ok()) {
      launch(unit, address, consumer, static_cast<unsigned>(delays()));
      return true;
    }
    *is_closed = failure.status == Status::kClosed;
    if (!*is_closed) ++counts.failures;
    check(*is_closed || link.refused > 0 || failure.status == Status::kReadError,
          "begin failed for no reason");
    return false;
  }

  void end(int64_t unit, Link::Stream consumer) {
    const Failure failure = stream->end(unit, consumer);
    check(failure.ok() || failure.status == Status::kDeviceError, "end failed");
  }

  // A thread that goes through the units on streams of its own, sometimes with two units at a time.
  void use(int64_t steps, std::vector<Link::Stream> consumers, int64_t num_slots, unsigned seed) {
    Random delays(seed);
    Walk walk(delays, stream->num_units());
    bool is_closed = false;
    for (int64_t step = 0; step < steps && !is_closed; ++step) {
      const Link::Stream consumer = consumers[step / 8 % consumers.size()];
      const int64_t unit = walk.next();
      pause(delays);
      if (!begin(unit, consumer, delays, &is_closed)) continue;
      const int64_t other = draw(delays, 0, stream->num_units() - 1);
      const bool two = other % num_slots > unit % num_slots && chance(delays, 0.2) &&
                       begin(other, consumer, delays, &is_closed);
      end(unit, consumer);
      if (two) end(other, consumer);
    }
    if (is_closed) ++counts.closes;
  }
};

void run_eager(unsigned seed, int64_t steps, Counts& counts) {
  Random random(seed);
  const bool failures = chance(random, 0.3), closes = chance(random, 0.3);
  Round round(seed, Kinds::kAll, failures, counts);
  if (failures) round.link.copy_failures = 0.01;
  if (failures && chance(random, 0.2)) round.link.other_failures = 0.002;
  const int64_t num_slots = draw(random, 1, 5), num_users = draw(random, 1, 3);
  std::vector<std::vector<Link::Stream>> consumers(static_cast<size_t>(num_users));
  for (auto& streams : consumers) {
    for (int64_t i = draw(random, 1, 2); i > 0; --i) streams.push_back(round.link.create_stream());
  }
  if (num_users == 1 && chance(random, 0.2)) consumers[0] = {HostLink::kNow};
  DeviceStreamOptions options;
  if (chance(random, 0.5)) options.max_ahead_nbytes = draw(random, 0, 3000);
  // Creating events is not refused, nothing has been given to a stream yet.
  round.open(num_slots, options);
  std::vector<std::thread> users;
  for (int64_t i = 0; i < num_users; ++i) {
    users.emplace_back([&, i] {
      round.use(steps / num_users, consumers[i], num_slots, seed * 8 + static_cast<unsigned>(i));
    });
  }
  if (closes) {
    std::this_thread::sleep_for(std::chrono::microseconds(draw(random, 1, steps * 20)));
    round.stream->close();
  }
  for (std::thread& user : users) user.join();
  const DeviceStreamStatistics statistics = round.stream->statistics();
  check(statistics.hits <= statistics.begins && statistics.late <= statistics.hits, "counts");
  round.stream->close();
  for (const auto& streams : consumers) {
    for (Link::Stream stream : streams) round.link.synchronize(stream);
  }
}

// Passes over a walk, outside and inside captures, replayed in any order on one stream.
void run_captures(unsigned seed, int64_t steps, Counts& counts) {
  Random random(seed);
  Round round(seed, Kinds::kHost, false, counts);
  const int64_t num_slots = draw(random, 1, 5);
  const Link::Stream consumer = round.link.create_stream();
  const Link::Stream side = round.link.create_stream();
  DeviceStreamOptions options;
  if (chance(random, 0.5)) options.max_ahead_nbytes = draw(random, 0, 3000);
  options.ahead_in_captures = chance(random, 0.8);
  round.open(num_slots, options);
  std::vector<std::shared_ptr<CaptureLink::Graph>> graphs;
  const int64_t num_units = round.stream->num_units();
  bool is_closed = false;
  for (int64_t done = 0; done < steps;) {
    if (!graphs.empty() && chance(random, 0.7)) {
      round.link.replay(graphs[draw(random, 0, static_cast<int64_t>(graphs.size()) - 1)], consumer);
      ++counts.replays;
      done += num_units;
      continue;
    }
    const bool captures = chance(random, 0.3);
    const bool whole = chance(random, 0.5), in_order = chance(random, 0.5);
    // The stream that captures is not the one that replays, as in torch.cuda.graph.
    const Link::Stream target = captures ? side : consumer;
    if (captures) round.link.begin_capture(side);
    Walk walk(random, num_units);
    const int64_t length = whole ? num_units : draw(random, 1, num_units);
    for (int64_t i = 0; i < length; ++i, ++done) {
      const int64_t unit = in_order ? i : walk.next();
      check(round.begin(unit, target, random, &is_closed), "begin failed");
      round.end(unit, target);
    }
    if (!captures) continue;
    if (!(whole && in_order)) check(round.stream->join(side).ok(), "join failed");
    std::shared_ptr<CaptureLink::Graph> graph = round.link.end_capture(side);
    check(graph != nullptr, "a capture is invalid, or a stream has not joined it");
    graphs.push_back(std::move(graph));
  }
  round.link.synchronize(consumer);
  round.stream->close();
}

// What one user in the order of the list must see.
void run_exact(unsigned seed, int64_t steps, Counts& counts) {
  Random random(seed);
  Round round(seed, Kinds::kAll, false, counts);
  const Link::Stream consumer = round.link.create_stream();
  const auto num_units = static_cast<int64_t>(round.model.units.size());
  const int64_t num_slots = draw(random, 2, 5);
  round.open(num_slots, {});
  bool is_closed = false;
  for (int64_t step = 0; step < steps; ++step) {
    check(round.begin(step % num_units, consumer, random, &is_closed), "begin failed");
    round.end(step % num_units, consumer);
  }
  const DeviceStreamStatistics statistics = round.stream->statistics();
  check(statistics.begins == steps, "not all begins are counted");
  check(statistics.hits == steps - 1, "not all but the first were copied ahead");
  round.link.synchronize(consumer);
}

int run(const std::string& mode, int64_t rounds, int64_t steps, unsigned seed) {
  const auto run_round = mode == "eager"      ? run_eager
                         : mode == "captures" ? run_captures
                         : mode == "exact"    ? run_exact
                                              : nullptr;
  if (run_round == nullptr) return 2;
  Counts counts;
  for (int64_t round = 0; round < rounds; ++round) {
    run_round(seed + static_cast<unsigned>(round), steps, counts);
  }
  std::printf(
      "begins %lld kernels %lld hits %lld late %lld failures %lld closes %lld replays %lld\n",
      static_cast<long long>(counts.begins), static_cast<long long>(counts.kernels),
      static_cast<long long>(counts.hits), static_cast<long long>(counts.late),
      static_cast<long long>(counts.failures), static_cast<long long>(counts.closes),
      static_cast<long long>(counts.replays));
  return 0;
}

}  // namespace
}  // namespace dcext

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  dcext::with_cuda = std::string(argv[5]) == "cuda";
  return dcext::run(argv[1], std::atoll(argv[2]), std::atoll(argv[3]),
                    static_cast<unsigned>(std::atoi(argv[4])));
}
