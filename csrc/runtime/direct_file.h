#pragma once

#include <memory>
#include <string>

#include "runtime/read_source.h"

namespace dcext {

/** What becomes of the pages of a file that is read. */
enum class PageCache : int {
  kBypass =
      0,  ///< the disk writes to the destination (O_DIRECT); where a file system cannot, pages are dropped behind
  kKeep = 1,  ///< the system keeps them as it likes
};

/** A file that stays open and must stay as it is: its size and time of modification are compared around every read. */
class DirectFile final : public ReadSource {
 public:
  /** @param file   receives the opened file.
   *  @return kOk or kReadError (found: errno). */
  static Failure open(const char* path, PageCache cache, std::unique_ptr<DirectFile>* file);
  ~DirectFile() override;
  DirectFile(const DirectFile&) = delete;
  DirectFile& operator=(const DirectFile&) = delete;

  Failure read(int64_t offset, int64_t nbytes, uint8_t* dst, const uint8_t** data) override;

  /** @return kOk, kReadError or kFileChanged. */
  Failure check_unchanged() const;

  int64_t nbytes() const { return nbytes_; }
  /** Whether reads bypass the page cache without having to drop pages. */
  bool is_direct() const { return direct_; }

 private:
  DirectFile(int fd, bool direct, bool drops);

  int fd_;
  bool direct_, drops_;
  int64_t nbytes_ = 0, modified_ns_ = 0;
};

}  // namespace dcext
