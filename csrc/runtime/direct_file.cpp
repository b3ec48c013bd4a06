#include "runtime/direct_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace dcext {
namespace {

constexpr int64_t kPage = 4096;  // what O_DIRECT aligns to, on all but exotic devices
constexpr int64_t kMaxRead = int64_t{1} << 30;  // read(2) takes less than 2^31 bytes at a time

Failure read_error(int error) {
  return Failure{Status::kReadError, "errno", -1, 0, static_cast<uint64_t>(error)};
}

int64_t modified_ns(const struct stat& info) {
  return info.st_mtim.tv_sec * int64_t{1000000000} + info.st_mtim.tv_nsec;
}

// Whether the file system reads this file with O_DIRECT: asked by reading a page.
bool reads_direct(int fd) {
  alignas(kPage) uint8_t page[kPage];
  return pread(fd, page, kPage, 0) >= 0;
}

// Fills [dst, dst + nbytes) from `offset` on, as far as the file goes that had `file_nbytes` bytes.
int read_fully(int fd, int64_t offset, int64_t nbytes, int64_t file_nbytes, uint8_t* dst,
               int64_t* done) {
  *done = 0;
  while (*done < std::min(nbytes, file_nbytes - offset)) {
    const int64_t want = std::min(nbytes - *done, kMaxRead);
    const ssize_t got = pread(fd, dst + *done, static_cast<size_t>(want), offset + *done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno;
    if (got == 0) break;  // the file was cut short
    *done += got;
  }
  return 0;
}

}  // namespace

Failure DirectFile::open(const char* path, PageCache cache, std::unique_ptr<DirectFile>* file) {
  const bool bypass = cache == PageCache::kBypass;
  int fd = ::open(path, O_RDONLY | O_CLOEXEC | (bypass ? O_DIRECT : 0));
  bool direct = bypass && fd >= 0;
  if (fd >= 0 && direct && !reads_direct(fd)) {
    close(fd);
    fd = -1;
    errno = EINVAL;
  }
  if (fd < 0 && bypass && errno == EINVAL) {  // this file system has no O_DIRECT
    fd = ::open(path, O_RDONLY | O_CLOEXEC);
    direct = false;
  }
  if (fd < 0) return read_error(errno);
  struct stat info;
  if (fstat(fd, &info) != 0) {
    const int error = errno;
    close(fd);
    return read_error(error);
  }
  file->reset(new DirectFile(fd, direct, bypass && !direct));
  (*file)->nbytes_ = info.st_size;
  (*file)->modified_ns_ = modified_ns(info);
  return {};
}

DirectFile::DirectFile(int fd, bool direct, bool drops) : fd_(fd), direct_(direct), drops_(drops) {}

DirectFile::~DirectFile() { close(fd_); }

Failure DirectFile::check_unchanged() const {
  struct stat info;
  if (fstat(fd_, &info) != 0) return read_error(errno);
  if (info.st_size != nbytes_) {
    return Failure{Status::kFileChanged, "file bytes", -1, static_cast<uint64_t>(nbytes_),
                   static_cast<uint64_t>(info.st_size)};
  }
  if (modified_ns(info) != modified_ns_) {
    return Failure{Status::kFileChanged, "time of modification, ns", -1,
                   static_cast<uint64_t>(modified_ns_), static_cast<uint64_t>(modified_ns(info))};
  }
  return {};
}

Failure DirectFile::read(int64_t offset, int64_t nbytes, uint8_t* dst, const uint8_t** data) {
  const int64_t begin = offset / kPage * kPage;
  const int64_t end = static_cast<int64_t>(align_up(static_cast<uint64_t>(offset + nbytes), kPage));
  int64_t done;
  if (const int error = read_fully(fd_, begin, end - begin, nbytes_, dst, &done); error != 0) {
    return read_error(error);
  }
  if (drops_) posix_fadvise(fd_, begin, end - begin, POSIX_FADV_DONTNEED);
  // Behind the read, so that what changed before or while the bytes came is noticed.
  if (const Failure bad = check_unchanged(); !bad.ok()) return bad;
  if (begin + done < offset + nbytes) {
    return Failure{Status::kFileChanged, "bytes up to", -1, static_cast<uint64_t>(offset + nbytes),
                   static_cast<uint64_t>(begin + done)};
  }
  *data = dst + (offset - begin);
  return {};
}

}  // namespace dcext
