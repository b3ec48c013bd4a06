#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "huffman_writer.h"

namespace dcext::fuzz {

/** A byte that is changed once the index has been made, as damage in memory would. */
struct Patch {
  enum Kind : uint8_t { kSetIndex = 0, kFlipIndex = 1, kSetPayload = 2, kFlipPayload = 3 };
  uint8_t kind = 0;
  uint32_t offset = 0;  ///< modulo the size of what is changed
  uint8_t byte = 0;

  bool of_index() const { return kind % 4 < kSetPayload; }
  void apply(uint8_t* data, size_t nbytes) const {
    uint8_t& target = data[offset % nbytes];
    target = static_cast<uint8_t>(kind % 2 == 0 ? byte : target ^ byte);
  }
};

/** What one run decodes. In a file: the number of patches (4 bytes), the patches (kind, offset, byte: 6 bytes each), the
 *  payload. */
struct FuzzInput {
  ByteVector payload;
  std::vector<Patch> patches;

  ByteVector to_bytes() const;
  size_t nbytes() const { return to_bytes().size(); }
  /** False where the bytes are too few. */
  static bool from_bytes(const ByteVector& bytes, FuzzInput* input);
};

bool read_file(const std::string& path, ByteVector* bytes);
bool write_file(const std::string& path, const ByteVector& bytes);

/** A folder of inputs, each in a file named by its hash. Those whose names begin with "regression-" once failed and are
 *  never removed. */
class Corpus {
 public:
  explicit Corpus(std::string folder) : folder_(std::move(folder)) {}

  /** All inputs, by name, so that runs are reproducible. */
  std::vector<std::pair<std::string, FuzzInput>> read() const;
  /** False where the file cannot be written. */
  bool add(const FuzzInput& input) const;
  void remove(const std::string& name) const;

 private:
  std::string folder_;
};

}  // namespace dcext::fuzz
