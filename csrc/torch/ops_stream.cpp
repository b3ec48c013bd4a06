#include "torch/ops_stream.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <mutex>

#include "base/fork_safe.h"
#include "runtime/memory.h"
#include "torch/ops_common.h"
#include "torch/ops_gradient.h"
#include "torch/ops_layers.h"

namespace dcext {
namespace {

// A slot is a huge page, where there is memory for so many of them that reading ahead goes on while some are in use. Where
// memory is scarce, rather a few slots than small ones: a read costs who computes 0.1 ms, however small it is.
constexpr int64_t kSlotNbytes = int64_t{2} << 20;
constexpr int64_t kGoodSlots = 16;
constexpr int64_t kSmallSlotNbytes = int64_t{512} << 10;
constexpr int64_t kFewSlots = 4;
constexpr int64_t kPage = 4096;

int64_t slot_nbytes_of(int64_t slots_nbytes) {
  const int64_t small = std::min(kSmallSlotNbytes, slots_nbytes / kFewSlots);
  return std::min(kSlotNbytes, std::max(slots_nbytes / kGoodSlots, small)) / kPage * kPage;
}

struct Handles {
  std::mutex& mutex = fork_safe_mutex<Handles>();
  std::map<int64_t, std::weak_ptr<HostStream>> streams;
  int64_t next = 1;
};

Handles& handles() {
  static Handles* const kHandles = new Handles;  // streams may outlive the statics
  return *kHandles;
}

int64_t largest_piece(const std::vector<std::vector<Piece>>& units) {
  int64_t largest = 0;
  for (const auto& pieces : units) {
    for (const Piece& piece : pieces) largest = std::max(largest, piece.nbytes);
  }
  return largest;
}

std::string place_of(const char* op, const HostStream::Layer& layer) {
  return std::string(op) + ": layer '" + layer.name + "' in " + layer.path;
}

}  // namespace

HostStream::HostStream(const std::vector<std::string>& paths, const std::vector<Source>& sources,
                       int64_t slots_nbytes, PageCache cache) {
  constexpr const char* kOp = "dcext.HostStream";
  for (const std::string& path : paths) {
    files_.emplace_back();
    const Failure bad = DirectFile::open(path.c_str(), cache, &files_.back());
    raise_if_failed((std::string(kOp) + ": " + path).c_str(), bad);
  }
  std::vector<std::vector<Piece>> units;
  const int64_t piece_nbytes = slot_nbytes_of(slots_nbytes) - ReadSource::kSlackNbytes;
  for (const Source& source : sources) {
    TORCH_CHECK_VALUE(0 <= source.file && source.file < static_cast<int64_t>(paths.size()), kOp,
                      ": file: expected an index in [0, ", paths.size(), "), got ", source.file);
    auto layer = std::make_unique<Layer>();
    layer->name = source.name;
    layer->path = paths[source.file];
    const std::string place = place_of(kOp, *layer);
    const PayloadView whole = parse_payload(place.c_str(), source.payload);
    const uint8_t* head = source.payload.const_data_ptr<uint8_t>();
    layer->head_bytes.assign(head, head + whole.layout().chunks_begin());
    raise_if_failed(place.c_str(),
                    PayloadView::parse_head(layer->head_bytes.data(), layer->head_bytes.size(),
                                            source.payload.numel(), &layer->head));
    layer->formats = std::make_unique<FormatChecks>(whole.layout().num_chunks());
    ReadSource* file = files_[source.file].get();
    layer->offset = source.offset;
    if (source.unit >= 0) {
      layer->verified = std::make_unique<VerifiedPayload>(*file, layer->head, source.offset);
      file = layer->verified.get();
    }
    layer->pieces = PanelPieces::cut(layer->head, file, source.offset, piece_nbytes);
    const bool joins = source.unit >= 0 && source.unit + 1 == static_cast<int64_t>(units.size());
    if (!joins) units.emplace_back();
    TORCH_CHECK_VALUE(source.unit < 0 || source.unit + 1 == static_cast<int64_t>(units.size()), kOp,
                      ": unit: expected ascending numbers from 0, got ", source.unit);
    if (source.unit >= 0) {
      groups_.resize(units.size());
      groups_.back().push_back(layer.get());
    }
    const auto& pieces = layer->pieces.pieces;
    units.back().insert(units.back().end(), pieces.begin(), pieces.end());
    layers_.push_back(std::move(layer));
  }
  const int64_t needed = std::max(piece_nbytes, largest_piece(units)) + ReadSource::kSlackNbytes;
  slots_.slot_nbytes = static_cast<int64_t>(align_up(static_cast<uint64_t>(needed), kPage));
  slots_.num_slots = slots_nbytes / slots_.slot_nbytes;
  TORCH_CHECK_VALUE(slots_.num_slots >= kMinSlots, kOp, ": slots_nbytes: expected at least ",
                    kMinSlots * slots_.slot_nbytes, ", room for ", kMinSlots,
                    " reads at a time, got ", slots_nbytes);
  slots_.data = allocate_weights(this->slots_nbytes());
  TORCH_CHECK_WITH(OutOfMemoryError, slots_.data != nullptr, kOp, ": the system has no ",
                   this->slots_nbytes(), " bytes left");
  stream_ = std::make_unique<WeightStream>(std::move(units), slots_, default_read_threads());
}

HostStream::~HostStream() {
  stream_.reset();  // waits for reads under way
  if (slots_.data != nullptr) free_weights(slots_.data, slots_nbytes());
  const std::lock_guard<std::mutex> lock(handles().mutex);
  handles().streams.erase(handle_);
}

void HostStream::enter(const std::shared_ptr<HostStream>& stream) {
  const std::lock_guard<std::mutex> lock(handles().mutex);
  stream->handle_ = handles().next++;
  handles().streams[stream->handle_] = stream;
}

std::shared_ptr<HostStream> HostStream::find(const char* op, int64_t handle) {
  std::shared_ptr<HostStream> found;
  {
    const std::lock_guard<std::mutex> lock(handles().mutex);
    const auto entry = handles().streams.find(handle);
    if (entry != handles().streams.end()) found = entry->second.lock();
  }
  TORCH_CHECK_VALUE(found != nullptr, op, ": stream: expected the handle of one that lives, got ",
                    handle);
  found->check_usable(op);
  return found;
}

bool HostStream::is_usable() const { return stream_->is_usable(); }

void HostStream::check_usable(const char* op) const {
  TORCH_CHECK(is_usable(), op,
              ": expected the process that made the stream, got a child of it after fork(): load "
              "the model there instead");
}

const HostStream::Layer& HostStream::layer(const char* op, int64_t unit) const {
  TORCH_CHECK_VALUE(groups_.empty(), op, ": stream: expected one of single layers, got one of ",
                    groups_.size(), " groups");
  TORCH_CHECK_VALUE(0 <= unit && unit < static_cast<int64_t>(layers_.size()), op,
                    ": unit: expected one in [0, ", layers_.size(), "), got ", unit);
  return *layers_[unit];
}

const std::vector<const HostStream::Layer*>& HostStream::group(const char* op, int64_t unit) const {
  TORCH_CHECK_VALUE(0 <= unit && unit < static_cast<int64_t>(groups_.size()), op,
                    ": unit: expected one in [0, ", groups_.size(), "), got ", unit);
  return groups_[unit];
}

void HostStream::read_all() {
  constexpr const char* kOp = "dcext.HostStream.read_all";
  check_usable(kOp);
  for (int64_t unit = 0; unit < stream_->num_units(); ++unit) {
    const auto use = stream_->begin(unit);
    const auto count = static_cast<int64_t>(stream_->pieces(unit).size());
    Failure failure;
    for (int64_t i = 0; i < count && failure.ok(); ++i) {
      const uint8_t* data;
      failure = stream_->wait(*use, i, &data);
      if (failure.ok()) stream_->release(*use, i);
    }
    stream_->end(use);
    raise_if_failed(kOp, failure);
  }
}

bool HostStream::is_direct() const {
  return std::all_of(files_.begin(), files_.end(), [](const auto& f) { return f->is_direct(); });
}

at::Tensor linear_streamed(const at::Tensor& x, int64_t stream, int64_t unit,
                           const at::Tensor& row_scale, const std::optional<at::Tensor>& col_scale,
                           const std::optional<at::Tensor>& bias, c10::string_view activations) {
  constexpr const char* kOp = "dcext::linear_streamed";
  const std::shared_ptr<HostStream> found = HostStream::find(kOp, stream);
  const HostStream::Layer& layer = found->layer(kOp, unit);
  StreamedPanels panels(found->stream(), unit, layer.head, layer.pieces, *layer.formats);
  return linear_from(place_of(kOp, layer).c_str(), layer.head, &panels, x, row_scale, col_scale,
                     bias, activations);
}

at::Tensor linear_streamed_input_grad(const at::Tensor& grad, int64_t stream, int64_t unit,
                                      const at::Tensor& row_scale,
                                      const std::optional<at::Tensor>& col_scale,
                                      int64_t in_features) {
  constexpr const char* kOp = "dcext::linear_streamed_input_grad";
  const std::shared_ptr<HostStream> found = HostStream::find(kOp, stream);
  const HostStream::Layer& layer = found->layer(kOp, unit);
  StreamedPanels panels(found->stream(), unit, layer.head, layer.pieces, *layer.formats);
  return linear_input_grad_from(place_of(kOp, layer).c_str(), layer.head, &panels, grad, row_scale,
                                col_scale, in_features);
}

at::Tensor embedding_streamed(const at::Tensor& indices, int64_t stream, int64_t unit,
                              const at::Tensor& row_scale,
                              const std::optional<at::Tensor>& col_scale, int64_t embedding_dim,
                              at::ScalarType dtype) {
  constexpr const char* kOp = "dcext::embedding_streamed";
  const std::shared_ptr<HostStream> found = HostStream::find(kOp, stream);
  const HostStream::Layer& layer = found->layer(kOp, unit);
  StreamedPanels panels(found->stream(), unit, layer.head, layer.pieces, *layer.formats);
  return embedding_from(place_of(kOp, layer).c_str(), layer.head, &panels, indices, row_scale,
                        col_scale, embedding_dim, dtype);
}

}  // namespace dcext
