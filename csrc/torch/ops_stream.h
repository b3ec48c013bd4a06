#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "runtime/direct_file.h"
#include "runtime/streamed_panels.h"
#include "runtime/verified_payload.h"

namespace dcext {

/** Layers whose payloads stay in files and are read, ahead of their use, into memory of fixed size. */
class HostStream {
 public:
  /** A payload in a file. */
  struct Source {
    std::string name;    ///< for messages
    int64_t file;        ///< index of its path
    int64_t offset;      ///< of its first byte
    at::Tensor payload;  ///< its bytes; only header and chunk table are read, and copied
    int64_t unit =
        -1;  ///< payloads that are read together have the same, ascending from 0; -1: one each
  };

  /** @param slots_nbytes   memory to read into; the stream uses as much of it as is a whole number of slots. */
  HostStream(const std::vector<std::string>& paths, const std::vector<Source>& sources,
             int64_t slots_nbytes, PageCache cache);
  ~HostStream();
  HostStream(const HostStream&) = delete;
  HostStream& operator=(const HostStream&) = delete;

  /** What operators know it by. */
  int64_t handle() const { return handle_; }
  /** False in a child of the process that made it, where nothing reads. */
  bool is_usable() const;
  static std::shared_ptr<HostStream> find(const char* op, int64_t handle);
  static void enter(const std::shared_ptr<HostStream>& stream);

  struct Layer {
    std::string name, path;
    std::vector<uint8_t> head_bytes;
    PayloadView head;
    PanelPieces pieces;
    int64_t offset = 0;  ///< of the payload in its file
    std::unique_ptr<FormatChecks> formats;
    std::unique_ptr<VerifiedPayload> verified;
  };
  /** The layer that is a unit of its own. */
  const Layer& layer(const char* op, int64_t unit) const;

  /** Layers that are read together, as units whose bytes go elsewhere: chunks are compared when they are read. */
  const std::vector<const Layer*>& group(const char* op, int64_t unit) const;

  WeightStream& stream() { return *stream_; }
  int64_t slots_nbytes() const { return slots_.slot_nbytes * slots_.num_slots; }
  /** Reads everything once, in order, as layers would, and computes nothing. */
  void read_all();

  uint8_t* slots_data() const { return slots_.data; }
  int64_t slot_nbytes() const { return slots_.slot_nbytes; }
  /** Whether all files are read without the page cache and without having to drop pages from it. */
  bool is_direct() const;

 private:
  void check_usable(const char* op) const;

  std::vector<std::unique_ptr<DirectFile>> files_;
  std::vector<std::unique_ptr<Layer>> layers_;
  std::vector<std::vector<const Layer*>> groups_;  // empty unless payloads are read together
  SlotMemory slots_;
  std::unique_ptr<WeightStream> stream_;
  int64_t handle_ = 0;
};

/** The smallest `slots_nbytes` for payloads of usual panels; more are needed where a panel has more bytes. */
constexpr int64_t kMinSlots = 2;

at::Tensor linear_streamed(const at::Tensor& x, int64_t stream, int64_t unit,
                           const at::Tensor& row_scale, const std::optional<at::Tensor>& col_scale,
                           const std::optional<at::Tensor>& bias, c10::string_view activations);

at::Tensor linear_streamed_input_grad(const at::Tensor& grad, int64_t stream, int64_t unit,
                                      const at::Tensor& row_scale,
                                      const std::optional<at::Tensor>& col_scale,
                                      int64_t in_features);

at::Tensor embedding_streamed(const at::Tensor& indices, int64_t stream, int64_t unit,
                              const at::Tensor& row_scale,
                              const std::optional<at::Tensor>& col_scale, int64_t embedding_dim,
                              at::ScalarType dtype);

}  // namespace dcext
