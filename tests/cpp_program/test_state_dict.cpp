// Files of states: what is written is read, and what is damaged or does not fit is refused whole.
#include <peer/peer.h>
#include <torch/types.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "../kernels/catch.hpp"

namespace {

using peer::nn::PEER;
using peer::nn::PEEROptions;

PEEROptions small() {
  return PEEROptions(8).num_experts({4, 6}).heads(2).num_experts_per_head(3).dim_key(4);
}

struct Directory {
  Directory() { path = mkdtemp(name); }
  ~Directory() { std::filesystem::remove_all(path); }
  std::string operator/(const std::string& file) const { return path + "/" + file; }

  char name[32] = "/tmp/peer-state-XXXXXX";
  std::string path;
};

std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write(const std::string& path, const std::vector<char>& bytes) {
  std::ofstream(path, std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

bool is_equal(const PEER& first, const PEER& second) {
  const auto there = second->named_parameters();
  for (const auto& item : first->named_parameters()) {
    if (!item.value().equal(there[item.key()])) {
      return false;
    }
  }
  return true;
}

}  // namespace

TEST_CASE("a state comes back bit by bit") {
  const Directory directory;
  PEER layer(small().glu(true)), other(small().glu(true));
  layer(torch::randn({5, 8}));
  peer::save_state_dict(*layer, directory / "state.pt");
  peer::load_state_dict(*other, directory / "state.pt");
  CHECK(is_equal(layer, other));
  CHECK(other->router->norm->running_var.equal(layer->router->norm->running_var));
  CHECK(other->router->norm->num_batches_tracked.item<int64_t>() == 1);
}

// The lines of the README.
TEST_CASE("the layer of the README is saved") {
  constexpr int64_t dim = 8;
  const torch::Tensor x = torch::randn({3, dim});
  const Directory directory;
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(directory.path);
  peer::nn::PEER layer(peer::nn::PEEROptions(dim).num_experts(1024 * 1024));
  torch::Tensor y = layer(x);
  peer::save_state_dict(*layer, "layer.pt");  // torch.load("layer.pt", weights_only=True)
  std::filesystem::current_path(before);
  CHECK(y.sizes() == x.sizes());
  CHECK(std::filesystem::file_size(directory / "layer.pt") > size_t{1024} * 1024 * 2 * dim * 4);
}

TEST_CASE("a state of other options is refused with every difference") {
  const Directory directory;
  PEER layer(small()), other(small().glu(true).query_norm("rms").query_bias(true));
  peer::save_state_dict(*layer, directory / "state.pt");
  const torch::Tensor before = other->experts->weight.clone();
  CHECK_THROWS_AS(peer::load_state_dict(*other, directory / "state.pt"), c10::ValueError);
  CHECK_THROWS_WITH(peer::load_state_dict(*other, directory / "state.pt"),
                    Catch::Contains("router.query.bias is missing from the file") &&
                        Catch::Contains("experts.weight: expected shape [24, 3, 8], got "
                                        "[24, 2, 8]") &&
                        Catch::Contains("router.norm.running_mean does not belong to the module"));
  CHECK(other->experts->weight.equal(before));
}

TEST_CASE("a file that is not there, or not a state, is refused") {
  const Directory directory;
  PEER layer(small());
  CHECK_THROWS_AS(peer::load_state_dict(*layer, directory / "none.pt"), c10::Error);
  for (const std::string content : {"", "PK", "no archive at all"}) {
    write(directory / "other.pt", {content.begin(), content.end()});
    CHECK_THROWS_AS(peer::load_state_dict(*layer, directory / "other.pt"), c10::Error);
  }
  CHECK_THROWS_AS(peer::save_state_dict(*layer, directory / "no/such/place.pt"), c10::Error);
}

TEST_CASE("a truncated file is refused and changes nothing") {
  const Directory directory;
  PEER layer(small()), other(small());
  peer::save_state_dict(*layer, directory / "state.pt");
  const auto bytes = read(directory / "state.pt");
  PEER untouched(small());
  peer::save_state_dict(*untouched, directory / "untouched.pt");
  peer::load_state_dict(*other, directory / "untouched.pt");
  for (size_t size = 0; size < bytes.size(); size += 61) {
    write(directory / "cut.pt", {bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size)});
    CHECK_THROWS_AS(peer::load_state_dict(*other, directory / "cut.pt"), std::exception);
  }
  CHECK(is_equal(other, untouched));
}

// Torch's archives have checksums, which torch.load does not verify either: an altered value is
// another value.
TEST_CASE("an altered file is refused, or holds other values") {
  const Directory directory;
  PEER layer(small()), other(small());
  peer::save_state_dict(*layer, directory / "state.pt");
  const auto bytes = read(directory / "state.pt");
  std::mt19937 random(0);
  int refused = 0;
  for (int round = 0; round < 2000; ++round) {
    auto altered = bytes;
    for (int count = 1 + round % 3; count > 0; --count) {
      altered[random() % altered.size()] = static_cast<char>(random());
    }
    write(directory / "altered.pt", altered);
    try {
      peer::load_state_dict(*other, directory / "altered.pt");
    } catch (const std::exception&) {
      ++refused;
    }
  }
  CHECK(refused > 500);
}

// Files whose archive is whole, and which say what cannot be of a tensor "a" of 8 numbers:
// PEER_HOSTILE_FILES names a directory of them, each beside a text with what is to be said of it.
// good.pt there is a state of the module.
TEST_CASE("files made to mislead are refused") {
  const char* directory = std::getenv("PEER_HOSTILE_FILES");
  if (directory == nullptr) {
    WARN("PEER_HOSTILE_FILES is not set");
    return;
  }
  torch::nn::Module module;
  const torch::Tensor a = module.register_parameter("a", torch::ones({8}));
  int refused = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    auto file = entry.path();
    if (file.extension() != ".txt") {
      continue;
    }
    const auto text = read(file);
    file.replace_extension(".pt");
    INFO(file);
    CHECK_THROWS_AS(peer::load_state_dict(module, file), c10::Error);
    CHECK_THROWS_WITH(peer::load_state_dict(module, file),
                      Catch::Contains(std::string(text.begin(), text.end())));
    ++refused;
  }
  CHECK(refused > 30);
  CHECK(a.equal(torch::ones({8})));
  peer::load_state_dict(module, std::string(directory) + "/good.pt");
  CHECK(a.equal(torch::zeros({8})));
}
