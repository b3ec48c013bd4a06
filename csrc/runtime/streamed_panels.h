#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "codec/payload_decoder.h"
#include "runtime/panel_source.h"
#include "runtime/weight_stream.h"

namespace dcext {

/** A payload in a file, cut into pieces of whole panels. */
struct PanelPieces {
  std::vector<Piece> pieces;
  std::vector<int64_t> first_panel;  ///< of each piece; num_panels behind the last

  /** @param head   of the payload, whose first byte is at `offset` of `source`.
   *  @param max_nbytes   of a piece, exceeded only where a panel alone has more. */
  static PanelPieces cut(const PayloadView& head, ReadSource* source, int64_t offset,
                         int64_t max_nbytes);
};

/** The panels of one call, as a stream brings them. Borrows everything. */
class StreamedPanels final : public PanelSource {
 public:
  /** @param pieces   those that `unit` of the stream was made of.
   *  @param formats   of the payload, kept from call to call. */
  StreamedPanels(WeightStream& stream, int64_t unit, const PayloadView& head,
                 const PanelPieces& pieces, FormatChecks& formats);

  void begin() override;
  void begin_some(const std::vector<int64_t>& panels) override;
  Failure acquire(int64_t panel, PayloadView* view) override;
  Failure check_format(const PayloadView& view, int64_t chunk) override;
  void release(int64_t panel) override;
  void end() override;

 private:
  int64_t piece_of(int64_t panel) const;
  int64_t index_in_use(int64_t piece) const;
  void expect(const std::vector<int64_t>& panels_of_pieces);

  WeightStream& stream_;
  const int64_t unit_;
  const PayloadView& head_;
  const PanelPieces& pieces_;
  FormatChecks& formats_;
  std::shared_ptr<WeightStream::Use> use_;
  std::vector<int64_t> some_;  // pieces of the use, ascending; empty: all
  std::unique_ptr<std::atomic<int64_t>[]>
      left_;  // panels of each piece of the use that are still to be released
};

}  // namespace dcext
