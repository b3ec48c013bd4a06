#pragma once

#include <algorithm>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "runtime/host_link.h"

namespace dcext {

/** A host link whose streams can be captured, with the rules of CUDA: what waits for a captured event joins the capture;
 *  nothing captured waits for what is not, nor the reverse; all streams must have joined the first one at the end. */
class CaptureLink : public HostLink {
  struct Node {
    std::function<void()> run;  // or empty
    int64_t sets = -1, waits = -1;
  };
  using Clock = std::map<Stream, size_t>;  // how much of each stream has happened before
  struct Recorded {
    uint64_t capture;
    int64_t flag;
    Clock clock;
  };

 public:
  /** A graph: what each stream of a capture was given. */
  struct Graph {
    uint64_t id = 0;
    Stream origin = nullptr;
    int64_t num_flags = 0;
    std::map<Stream, std::vector<Node>> lanes;
    std::map<Stream, Clock> clocks;
    bool is_valid = true;
  };

  CaptureLink() : capture_stream_(create_stream()) {}

  Stream capture_stream() const override { return capture_stream_; }

  void begin_capture(Stream stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto graph = std::make_shared<Graph>();
    graph->id = ++num_captures_;
    graph->origin = stream;
    graph->lanes[stream];
    capturing_[stream] = graph;
  }

  /** @return null where a stream has not joined, or a rule was broken. */
  std::shared_ptr<Graph> end_capture(Stream stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<Graph> graph = capturing_.at(stream);
    for (const auto& [lane, nodes] : graph->lanes) {
      capturing_.erase(lane);
      if (lane != stream && graph->clocks[stream][lane] != nodes.size()) graph->is_valid = false;
    }
    return graph->is_valid ? graph : nullptr;
  }

  /** Runs a graph on a stream, each of its streams in a thread. */
  void replay(const std::shared_ptr<Graph>& graph, Stream stream) {
    HostLink::enqueue(stream, [graph] {
      std::mutex mutex;
      std::condition_variable changed;
      std::vector<bool> flags(static_cast<size_t>(graph->num_flags));
      std::vector<std::thread> threads;
      for (auto& entry : graph->lanes) {
        threads.emplace_back([&, &nodes = entry.second] {
          for (const Node& node : nodes) {
            if (node.run) node.run();
            std::unique_lock<std::mutex> lock(mutex);
            if (node.sets >= 0) flags[node.sets] = true;
            if (node.sets >= 0) changed.notify_all();
            if (node.waits >= 0) changed.wait(lock, [&] { return flags[node.waits]; });
          }
        });
      }
      for (std::thread& thread : threads) thread.join();
    });
  }

  bool is_any_capturing() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return !capturing_.empty();
  }

  void enqueue(Stream stream, std::function<void()> function) override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = capturing_.find(stream);
      if (found != capturing_.end()) {
        found->second->lanes[stream].push_back({std::move(function), -1, -1});
        return;
      }
    }
    HostLink::enqueue(stream, std::move(function));
  }

  Failure record(Event event, Stream stream) override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      recorded_.erase(event);
      const auto found = capturing_.find(stream);
      if (found != capturing_.end()) {
        Graph& graph = *found->second;
        Clock clock = graph.clocks[stream];
        clock[stream] = graph.lanes[stream].size();
        recorded_[event] = {graph.id, graph.num_flags, clock};
        graph.lanes[stream].push_back({{}, graph.num_flags++, -1});
        return {};
      }
    }
    return HostLink::record(event, stream);
  }

  Failure wait(Stream stream, Event event) override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto captured = recorded_.find(event);
      const auto found = capturing_.find(stream);
      if (captured == recorded_.end()) {
        if (found != capturing_.end()) return broken(*found->second);
      } else {
        const Recorded& recorded = captured->second;
        std::shared_ptr<Graph> graph;
        for (const auto& [other, candidate] : capturing_) {
          if (candidate->id == recorded.capture) graph = candidate;
        }
        if (graph == nullptr) return {Status::kDeviceError, "an event of an old capture", -1, 0, 1};
        if (found != capturing_.end() && found->second != graph) return broken(*graph);
        capturing_[stream] = graph;
        for (const auto& [lane, position] : recorded.clock) {
          size_t& known = graph->clocks[stream][lane];
          // The record itself is a node of its stream.
          known = std::max(known, position + (lane == recorded_lane(*graph, recorded) ? 1 : 0));
        }
        graph->lanes[stream].push_back({{}, -1, recorded.flag});
        return {};
      }
    }
    return HostLink::wait(stream, event);
  }

  Failure query(Event event, bool* happened) override {
    return is_captured(event) ? not_run() : HostLink::query(event, happened);
  }
  Failure wait_on_host(Event event) override {
    return is_captured(event) ? not_run() : HostLink::wait_on_host(event);
  }

  Failure capture_of(Stream stream, uint64_t* id) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = capturing_.find(stream);
    *id = found == capturing_.end() ? 0 : found->second->id;
    return {};
  }

 private:
  static Failure broken(Graph& graph) {
    graph.is_valid = false;
    return {Status::kDeviceError, "a wait across a capture's border", -1, 0, 2};
  }
  static Failure not_run() { return {Status::kDeviceError, "an event in a capture", -1, 0, 3}; }

  bool is_captured(Event event) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return recorded_.count(event) != 0;
  }

  // The stream that an event was recorded on: the one whose node sets its flag.
  static Stream recorded_lane(const Graph& graph, const Recorded& recorded) {
    for (const auto& [lane, nodes] : graph.lanes) {
      const auto position = recorded.clock.find(lane);
      if (position != recorded.clock.end() && position->second < nodes.size() &&
          nodes[position->second].sets == recorded.flag) {
        return lane;
      }
    }
    return nullptr;
  }

  const Stream capture_stream_;
  std::mutex mutex_;
  uint64_t num_captures_ = 0;
  std::map<Stream, std::shared_ptr<Graph>> capturing_;
  std::map<Event, Recorded> recorded_;  // in captures, last
};

}  // namespace dcext
