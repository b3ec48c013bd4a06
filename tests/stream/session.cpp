#include "session.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "watchdog.h"

namespace dcext::stress {
namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kNever = INT64_MAX;

void raise(std::atomic<int64_t>* most, int64_t value) {
  int64_t before = *most;
  while (before < value && !most->compare_exchange_weak(before, value)) {
  }
}

}  // namespace

Session::Session(World& world, uint64_t seed)
    : world_(world),
      random_(seed),
      steps_wanted_(random_.one_in(6) ? random_.between(0, 20) : random_.between(50, 2000)),
      close_at_(random_.one_in(2) ? random_.between(0, std::max<int64_t>(1, steps_wanted_))
                                  : kNever),
      leave_open_(random_.one_in(2)) {
  make_stream();
}

Piece Session::random_piece() {
  const int64_t nbytes =
      random_.one_in(8) ? random_.between(1, 64) : random_.between(1, most_nbytes_);
  FaultySource* const source = sources_[random_.below(sources_.size())].get();
  return {source, random_.between(0, world_.file_nbytes - nbytes), nbytes};
}

void Session::make_stream() {
  most_nbytes_ = random_.pick({100, 4096, 4096, 16384, 16384, 65536});
  const int64_t slot_nbytes = (most_nbytes_ + ReadSource::kSlackNbytes + kPage - 1) / kPage * kPage;
  const int64_t num_slots = random_.one_in(4) ? random_.between(7, 48) : random_.between(1, 6);
  slots_ = std::make_unique<GuardedSlots>(num_slots, slot_nbytes);
  const Faults faults{static_cast<uint64_t>(random_.pick({0, 500, 100, 20, 3})),
                      static_cast<uint64_t>(random_.pick({0, 200, 50}))};
  for (ReadSource* file : world_.files) {
    sources_.push_back(std::make_unique<FaultySource>(*file, *slots_, faults, random_.next()));
  }
  units_.resize(random_.between(1, 12));
  const int64_t most_pieces = random_.pick({1, 4, 4, 8, 20});
  for (std::vector<Piece>& unit : units_) {
    const int64_t num_pieces = random_.one_in(16) ? 0 : random_.between(1, most_pieces);
    for (int64_t i = 0; i < num_pieces; ++i) unit.push_back(random_piece());
  }
  stream_ = std::make_unique<WeightStream>(units_, slots_->memory(), world_.threads);
}

void Session::run() {
  for (int64_t i = random_.between(1, world_.most_users); i-- > 0;) {
    const uint64_t seed = random_.next();
    spawn({Route(stream_->num_units(), seed), fuzz::Random(seed + 1)});
  }
  for (;;) {
    std::thread user;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (users_.empty()) break;
      user = std::move(users_.back());
      users_.pop_back();
    }
    user.join();
  }
  // The rest is read ahead, or being read, when the stream goes.
  if (!closed_ && !leave_open_) {
    stream_->close();
    closed_ = true;
    ++world_.closes;
  }
  check_statistics();
  const Doing doing("the stream's end", stream_.get(), -1);
  stream_.reset();
  ++world_.streams;
  for (const auto& source : sources_) world_.injected += source->injected();
}

void Session::spawn(User user) {
  const std::lock_guard<std::mutex> lock(mutex_);
  users_.emplace_back([this, user = std::move(user)]() mutable { use_stream(std::move(user)); });
}

void Session::use_stream(User user) {
  // Those who come after the stream was closed see that it is.
  int64_t after_close = 3;
  while (steps_ < steps_wanted_ && after_close > 0) {
    step(&user);
    if (closed_) --after_close;
    if (!user.random.one_in(1000)) continue;
    // This thread's order stays behind. It is joined after the new one has begun, so that their ids differ.
    ++world_.left_threads;
    return spawn(std::move(user));
  }
}

void Session::step(User* user) {
  close_when_due();
  const bool closed_before = closed_;
  const int64_t unit = user->route.next();
  {
    const Doing doing("begin", stream_.get(), unit);
    Pass pass(*stream_, *slots_, unit, units_[unit], stream_->begin(unit), user->random.next());
    if (user->random.one_in(12)) look_up(user);
    use(&pass, user, closed_before);
  }
  ++steps_;
  ++world_.steps;
}

// Some pieces of a unit, while another one is begun or not.
void Session::look_up(User* user) {
  const bool closed_before = closed_;
  const int64_t unit = user->random.between(0, stream_->num_units() - 1);
  std::vector<int64_t> indices;
  std::vector<Piece> pieces;
  for (size_t i = 0; i < units_[unit].size(); ++i) {
    if (user->random.one_in(2)) continue;
    indices.push_back(static_cast<int64_t>(i));
    pieces.push_back(units_[unit][i]);
  }
  const Doing doing("begin_some", stream_.get(), unit);
  Pass pass(*stream_, *slots_, unit, pieces, stream_->begin_some(unit, indices),
            user->random.next());
  use(&pass, user, closed_before);
  ++world_.look_ups;
}

void Session::use(Pass* pass, User* user, bool closed_before) {
  const bool early = user->random.one_in(10);
  const int64_t count = early ? user->random.between(0, pass->num_panels()) : pass->num_panels();
  const int workers = static_cast<int>(user->random.pick({1, 1, 2, 3}));
  pass->use_panels(count, workers, world_.pool, [this] { close_when_due(); });
  const Pass::Outcome outcome = pass->end();
  used_nbytes_ += outcome.used_nbytes;
  if (outcome.closed && !close_begun_) stop("a stream that says it is closed");
  if (closed_before && (outcome.used_nbytes != 0 || outcome.failed)) {
    stop("pieces of a closed stream");
  }
  world_.failed_steps += outcome.failed ? 1 : 0;
  world_.closed_steps += outcome.closed ? 1 : 0;
  world_.early_steps += early ? 1 : 0;
}

void Session::close_when_due() {
  if (steps_ < close_at_ || close_begun_.exchange(true)) return;
  stream_->close();
  closed_ = true;
  ++world_.closes;
}

// There is no use: what was read was used or dropped, or still is expected.
void Session::check_statistics() const {
  const StreamStatistics statistics = stream_->statistics();
  const int64_t num_slots = slots_->memory().num_slots;
  if (statistics.peak_slots > num_slots) stop("more slots than there are");
  if (statistics.used_nbytes != used_nbytes_) stop("bytes used are not those that users saw");
  const int64_t rest = statistics.read_nbytes - statistics.used_nbytes - statistics.dropped_nbytes;
  if (rest < 0 || (closed_ && rest != 0) || rest > num_slots * most_nbytes_) {
    stop("bytes read are neither used nor dropped");
  }
  raise(&world_.peak_slots, statistics.peak_slots);
  world_.read_nbytes += statistics.read_nbytes;
  world_.used_nbytes += statistics.used_nbytes;
  world_.dropped_nbytes += statistics.dropped_nbytes + rest;
}

}  // namespace dcext::stress
