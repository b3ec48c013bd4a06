#include "runtime/streamed_panels.h"

#include <algorithm>

namespace dcext {
namespace {

int64_t panel_begin(const PayloadView& head, int64_t panel) {
  return static_cast<int64_t>(head.chunk(panel * head.layout().num_slabs()).offset);
}

int64_t panel_end(const PayloadView& head, int64_t panel) {
  return static_cast<int64_t>(head.chunk((panel + 1) * head.layout().num_slabs() - 1).extent_end());
}

}  // namespace

PanelPieces PanelPieces::cut(const PayloadView& head, ReadSource* source, int64_t offset,
                             int64_t max_nbytes) {
  PanelPieces cut;
  const int64_t num_panels = head.layout().num_panels();
  for (int64_t first = 0; first < num_panels;) {
    const int64_t begin = panel_begin(head, first);
    int64_t last = first;
    while (last + 1 < num_panels && panel_end(head, last + 1) - begin <= max_nbytes) ++last;
    cut.pieces.push_back({source, offset + begin, panel_end(head, last) - begin});
    cut.first_panel.push_back(first);
    first = last + 1;
  }
  cut.first_panel.push_back(num_panels);
  return cut;
}

StreamedPanels::StreamedPanels(WeightStream& stream, int64_t unit, const PayloadView& head,
                               const PanelPieces& pieces, FormatChecks& formats)
    : stream_(stream), unit_(unit), head_(head), pieces_(pieces), formats_(formats) {}

int64_t StreamedPanels::piece_of(int64_t panel) const {
  const auto& first = pieces_.first_panel;
  return std::upper_bound(first.begin(), first.end(), panel) - first.begin() - 1;
}

int64_t StreamedPanels::index_in_use(int64_t piece) const {
  if (some_.empty()) return piece;
  return std::lower_bound(some_.begin(), some_.end(), piece) - some_.begin();
}

void StreamedPanels::expect(const std::vector<int64_t>& panels_of_pieces) {
  left_.reset(new std::atomic<int64_t>[panels_of_pieces.size()]);
  for (size_t i = 0; i < panels_of_pieces.size(); ++i) left_[i] = panels_of_pieces[i];
}

void StreamedPanels::begin() {
  some_.clear();
  std::vector<int64_t> panels;
  for (size_t i = 0; i < pieces_.pieces.size(); ++i) {
    panels.push_back(pieces_.first_panel[i + 1] - pieces_.first_panel[i]);
  }
  expect(panels);
  use_ = stream_.begin(unit_);
}

void StreamedPanels::begin_some(const std::vector<int64_t>& panels) {
  some_.clear();
  std::vector<int64_t> panels_of_pieces;
  for (const int64_t panel : panels) {
    const int64_t piece = piece_of(panel);
    if (some_.empty() || some_.back() != piece) {
      some_.push_back(piece);
      panels_of_pieces.push_back(0);
    }
    ++panels_of_pieces.back();
  }
  expect(panels_of_pieces);
  use_ = stream_.begin_some(unit_, some_);
}

Failure StreamedPanels::acquire(int64_t panel, PayloadView* view) {
  const int64_t piece = piece_of(panel);
  const uint8_t* data;
  Failure failure = stream_.wait(*use_, index_in_use(piece), &data);
  if (!failure.ok()) {
    failure.chunk = panel * head_.layout().num_slabs();
    return failure;
  }
  const int64_t offset = panel_begin(head_, pieces_.first_panel[piece]);
  *view = head_.with_chunks(data, static_cast<uint64_t>(offset));
  return {};
}

Failure StreamedPanels::check_format(const PayloadView& view, int64_t chunk) {
  return formats_.check(view, chunk);
}

void StreamedPanels::release(int64_t panel) {
  const int64_t index = index_in_use(piece_of(panel));
  if (--left_[index] == 0) stream_.release(*use_, index);
}

void StreamedPanels::end() {
  stream_.end(use_);
  use_.reset();
}

}  // namespace dcext
