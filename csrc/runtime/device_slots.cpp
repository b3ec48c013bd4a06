#include "runtime/device_slots.h"

#include <algorithm>

namespace dcext {

bool DeviceSlot::is_used_here() const {
  return std::find(users.begin(), users.end(), std::this_thread::get_id()) != users.end();
}

// Another thread may end what one has begun.
void DeviceSlot::remove_user() {
  const auto found = std::find(users.begin(), users.end(), std::this_thread::get_id());
  users.erase(found == users.end() ? users.begin() : found);
}

void DeviceSlot::forget() {
  unit = -1;
  failure = {};
  ahead = false;
  kept.reset();
}

Failure SlotLane::prepare(Link& the_link, Link::Stream the_copies, int64_t num_slots) {
  link = &the_link;
  copies = the_copies;
  slots.resize(static_cast<size_t>(num_slots));
  for (DeviceSlot& slot : slots) {
    const Failure failure = link->create_event(&slot.ready);
    if (!failure.ok()) return failure;
  }
  return {};
}

SlotLane::~SlotLane() {
  for (const DeviceSlot& slot : slots) {
    if (slot.ready != nullptr) link->destroy_event(slot.ready);
    for (const DeviceSlot::Reader& reader : slot.readers) link->destroy_event(reader.read);
  }
  for (Link::Event event : spare) link->destroy_event(event);
}

Failure SlotLane::add_reader(DeviceSlot& slot, Link::Stream stream) {
  for (const DeviceSlot::Reader& reader : slot.readers) {
    if (reader.stream == stream) return link->record(reader.read, stream);
  }
  if (spare.empty()) {
    Link::Event event;
    const Failure failure = link->create_event(&event);
    if (!failure.ok()) return failure;
    spare.push_back(event);
  }
  const Failure failure = link->record(spare.back(), stream);
  if (!failure.ok()) return failure;
  slot.readers.push_back({stream, spare.back()});
  spare.pop_back();
  return {};
}

// Where one of the waits fails, all are kept for the next time: twice does no harm.
Failure SlotLane::wait_for_readers(DeviceSlot& slot) {
  for (const DeviceSlot::Reader& reader : slot.readers) {
    const Failure failure = link->wait(copies, reader.read);
    if (!failure.ok()) return failure;
  }
  for (const DeviceSlot::Reader& reader : slot.readers) spare.push_back(reader.read);
  slot.readers.clear();
  return {};
}

bool SlotLane::update(DeviceSlot& slot) {
  bool happened = false;
  if (slot.under_way && link->query(slot.ready, &happened).ok() && happened) slot.under_way = false;
  return slot.under_way;
}

void SlotLane::start_capture(uint64_t id, int64_t num_units) {
  for (DeviceSlot& slot : slots) {
    slot.forget();
    slot.users.clear();
    for (const DeviceSlot::Reader& reader : slot.readers) spare.push_back(reader.read);
    slot.readers.clear();
  }
  capture = id;
  forked = false;
  begun.assign(static_cast<size_t>(num_units), false);
}

}  // namespace dcext
