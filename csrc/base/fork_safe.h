#pragma once

#include <pthread.h>

#include <mutex>

namespace dcext {

/** A mutex that nobody holds in a child after fork(): whoever forks waits for it first. One for each `Tag`, never
 *  destroyed. For short sections that wait for no other lock. */
template <typename Tag>
std::mutex& fork_safe_mutex() {
  static std::mutex* const kMutex = [] {
    pthread_atfork([] { fork_safe_mutex<Tag>().lock(); }, [] { fork_safe_mutex<Tag>().unlock(); },
                   [] { fork_safe_mutex<Tag>().unlock(); });
    return new std::mutex;
  }();
  return *kMutex;
}

}  // namespace dcext
