#include "nn/state_file.h"

#include <ATen/ops/from_blob.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>

namespace peer::nn {

namespace {

struct Value;

// The opcodes of pickle protocol 2 that make a dictionary of tensors, by their names in Python's
// pickletools.
enum Opcode : uint8_t {
  kMark = '(',
  kEmptyTuple = ')',
  kStop = '.',
  kBinInt = 'J',
  kBinInt1 = 'K',
  kBinInt2 = 'M',
  kNone = 'N',
  kBinPersId = 'Q',
  kReduce = 'R',
  kBinUnicode = 'X',
  kBuild = 'b',
  kGlobal = 'c',
  kBinGet = 'h',
  kLongBinGet = 'j',
  kBinPut = 'q',
  kLongBinPut = 'r',
  kSetItem = 's',
  kTuple = 't',
  kSetItems = 'u',
  kEmptyDict = '}',
  kProto = 0x80,
  kTuple1 = 0x85,
  kTuple2 = 0x86,
  kTuple3 = 0x87,
  kNewTrue = 0x88,
  kNewFalse = 0x89,
  kLong1 = 0x8a,
};

// What the stack holds. An instruction of two bytes can copy a value, so values are small: text
// points into the pickle, and everything else is shared. `Other` stands for values that do not
// matter here, such as the metadata that Python appends. Their contents are dropped, so nothing can
// nest.
struct Other {};
struct Mark {};
struct Storage {
  std::string_view name;
  at::ScalarType dtype;
  int64_t size;
};
struct Tuple {
  std::vector<Value> items;
  bool has_tuples = false;
};
struct Dict {
  std::vector<std::pair<std::string_view, Value>> entries;
};
enum class Function { ordered_dict, rebuild_tensor, rebuild_parameter };

struct Value {
  std::variant<Other,
               Mark,
               int64_t,
               std::string_view,
               at::ScalarType,
               Function,
               Storage,
               std::shared_ptr<const StoredTensor>,
               std::shared_ptr<Tuple>,
               std::shared_ptr<Dict>>
      value;
};

constexpr std::pair<std::string_view, at::ScalarType> kStorageTypes[] = {
    {"torch.FloatStorage", at::kFloat}, {"torch.DoubleStorage", at::kDouble},
    {"torch.HalfStorage", at::kHalf},   {"torch.BFloat16Storage", at::kBFloat16},
    {"torch.LongStorage", at::kLong},   {"torch.IntStorage", at::kInt},
    {"torch.ShortStorage", at::kShort}, {"torch.CharStorage", at::kChar},
    {"torch.ByteStorage", at::kByte},   {"torch.BoolStorage", at::kBool},
};

constexpr std::pair<std::string_view, Function> kFunctions[] = {
    {"collections.OrderedDict", Function::ordered_dict},
    {"torch._utils._rebuild_tensor_v2", Function::rebuild_tensor},
    {"torch._utils._rebuild_parameter", Function::rebuild_parameter},
};

// Whether the last element, and so every element, lies within the storage. No number in a file is
// trusted: products of them may overflow int64.
bool is_within_storage(const StoredTensor& tensor) {
  if (tensor.sizes.size() != tensor.strides.size() || tensor.offset < 0) {
    return false;
  }
  bool is_empty = false;
  for (const int64_t size : tensor.sizes) {
    if (size < 0) {
      return false;
    }
    is_empty |= size == 0;
  }
  int64_t last = tensor.offset;
  for (size_t dim = 0; dim < tensor.sizes.size(); ++dim) {
    int64_t step = 0;
    if (tensor.strides[dim] < 0 ||
        (!is_empty && (__builtin_mul_overflow(tensor.sizes[dim] - 1, tensor.strides[dim], &step) ||
                       __builtin_add_overflow(last, step, &last)))) {
      return false;
    }
  }
  return is_empty ? tensor.offset <= tensor.storage_size : last < tensor.storage_size;
}

class Unpickler {
 public:
  explicit Unpickler(std::string_view pickle) : pickle_(pickle) {}

  std::map<std::string, StoredTensor> run() {
    while (step(static_cast<uint8_t>(take(1)[0]))) {
    }
    TORCH_CHECK(stack_.size() == 1, "the pickle does not end with one value");
    std::map<std::string, StoredTensor> tensors;
    for (auto& [name, value] : pop<std::shared_ptr<Dict>>()->entries) {
      const auto* tensor = std::get_if<std::shared_ptr<const StoredTensor>>(&value.value);
      TORCH_CHECK(tensor != nullptr, "'", name, "' is not a tensor");
      TORCH_CHECK(tensors.emplace(name, **tensor).second, "'", name, "' occurs twice");
    }
    return tensors;
  }

 private:
  // Executes one instruction. Returns false at the end.
  bool step(uint8_t opcode) {
    switch (opcode) {
      case kProto:
        take(1);
        return true;
      case kGlobal:
        push_global();
        return true;
      case kBinPut:
        memo_[integer<uint8_t>()] = top();
        return true;
      case kLongBinPut:
        memo_[integer<uint32_t>()] = top();
        return true;
      case kBinGet:
        push_memo(integer<uint8_t>());
        return true;
      case kLongBinGet:
        push_memo(integer<uint32_t>());
        return true;
      case kMark:
        push(Mark());
        return true;
      case kEmptyTuple:
        push_tuple({});
        return true;
      case kTuple1:
        push_tuple(pop_last(1));
        return true;
      case kTuple2:
        push_tuple(pop_last(2));
        return true;
      case kTuple3:
        push_tuple(pop_last(3));
        return true;
      case kTuple:
        push_tuple(pop_to_mark());
        return true;
      case kEmptyDict:
        push(std::make_shared<Dict>());
        return true;
      case kSetItem:
        set_items(pop_last(2));
        return true;
      case kSetItems:
        set_items(pop_to_mark());
        return true;
      case kBinUnicode:
        push(take(integer<uint32_t>()));
        return true;
      case kBinInt1:
        push(int64_t{integer<uint8_t>()});
        return true;
      case kBinInt2:
        push(int64_t{integer<uint16_t>()});
        return true;
      case kBinInt:
        push(int64_t{integer<int32_t>()});
        return true;
      case kLong1:
        push(long_integer());
        return true;
      case kNewTrue:
      case kNewFalse:
      case kNone:
        push(Other());
        return true;
      case kBinPersId:
        push_storage();
        return true;
      case kReduce:
        call();
        return true;
      case kBuild:  // sets attributes, such as the metadata
        pop();
        return true;
      case kStop:
        return false;
      default:
        TORCH_CHECK(false, "opcode ", static_cast<int>(opcode),
                    " does not belong to a dictionary of tensors as torch.save writes it");
    }
  }

  std::string_view take(size_t count) {
    TORCH_CHECK(count <= pickle_.size() - position_, "the pickle ends too early");
    const auto taken = pickle_.substr(position_, count);
    position_ += count;
    return taken;
  }

  template <typename Integer>
  Integer integer() {
    Integer number;
    std::memcpy(&number, take(sizeof(number)).data(), sizeof(number));
    return number;
  }

  // A signed little-endian integer of at most eight bytes.
  int64_t long_integer() {
    const auto bytes = take(integer<uint8_t>());
    TORCH_CHECK(bytes.size() <= 8, "a number has ", bytes.size(), " bytes");
    uint64_t number = !bytes.empty() && (bytes.back() & 0x80) != 0 ? ~uint64_t{0} : 0;
    for (size_t i = bytes.size(); i-- > 0;) {
      number = number << 8 | static_cast<uint8_t>(bytes[i]);
    }
    return static_cast<int64_t>(number);
  }

  std::string_view line() {
    const size_t end = pickle_.find('\n', position_);
    TORCH_CHECK(end != std::string_view::npos, "the pickle ends too early");
    const auto text = take(end - position_);
    take(1);
    return text;
  }

  template <typename T>
  void push(T value) {
    stack_.push_back(Value{std::move(value)});
  }

  const Value& top() const {
    TORCH_CHECK(!stack_.empty(), "the pickle pops from an empty stack");
    return stack_.back();
  }

  Value pop() {
    Value value = top();
    stack_.pop_back();
    return value;
  }

  template <typename T>
  T pop() {
    return get<T>(pop());
  }

  template <typename T>
  static T get(const Value& value) {
    const T* found = std::get_if<T>(&value.value);
    TORCH_CHECK(found != nullptr, "the pickle has a value of an unexpected type");
    return *found;
  }

  std::vector<Value> pop_last(size_t count) {
    TORCH_CHECK(count <= stack_.size(), "the pickle pops from an empty stack");
    const auto first = stack_.end() - static_cast<std::ptrdiff_t>(count);
    std::vector<Value> values(first, stack_.end());
    stack_.erase(first, stack_.end());
    return values;
  }

  std::vector<Value> pop_to_mark() {
    size_t count = 0;
    while (count < stack_.size() &&
           !std::holds_alternative<Mark>(stack_[stack_.size() - 1 - count].value)) {
      ++count;
    }
    TORCH_CHECK(count < stack_.size(), "the pickle pops from an empty stack");
    auto values = pop_last(count);
    pop();
    return values;
  }

  void push_memo(uint32_t place) {
    const auto found = memo_.find(place);
    TORCH_CHECK(found != memo_.end(), "the pickle reads a memo entry that it has not written");
    stack_.push_back(found->second);
  }

  // A function's arguments may hold tuples of numbers. Deeper nesting is an error.
  void push_tuple(std::vector<Value> items) {
    bool has_tuples = false;
    for (const Value& item : items) {
      if (const auto* inner = std::get_if<std::shared_ptr<Tuple>>(&item.value)) {
        TORCH_CHECK(!(*inner)->has_tuples, "the pickle nests tuples too deeply");
        has_tuples = true;
      }
    }
    push(std::make_shared<Tuple>(Tuple{std::move(items), has_tuples}));
  }

  void set_items(const std::vector<Value>& items) {
    const auto dict = get<std::shared_ptr<Dict>>(top());
    TORCH_CHECK(items.size() % 2 == 0, "the pickle has a key without a value");
    for (size_t i = 0; i < items.size(); i += 2) {
      const bool is_tensor =
          std::holds_alternative<std::shared_ptr<const StoredTensor>>(items[i + 1].value);
      dict->entries.emplace_back(get<std::string_view>(items[i]),
                                 is_tensor ? items[i + 1] : Value{Other()});
    }
  }

  void push_global() {
    const std::string_view package = line();
    const std::string name = std::string(package) + "." + std::string(line());
    for (const auto& [known, function] : kFunctions) {
      if (name == known) {
        return push(function);
      }
    }
    for (const auto& [known, dtype] : kStorageTypes) {
      if (name == known) {
        return push(dtype);
      }
    }
    TORCH_CHECK(false, "the pickle imports ", name,
                ", which does not belong to a dictionary of tensors");
  }

  // ("storage", its type, its name, its device, its size)
  void push_storage() {
    const auto id = pop<std::shared_ptr<Tuple>>();
    TORCH_CHECK(id->items.size() == 5 && get<std::string_view>(id->items[0]) == "storage",
                "a persistent id is not a storage");
    push(Storage{get<std::string_view>(id->items[2]), get<at::ScalarType>(id->items[1]),
                 get<int64_t>(id->items[4])});
  }

  void call() {
    const auto arguments = pop<std::shared_ptr<Tuple>>();
    const auto function = pop<Function>();
    const auto argument = [&](size_t i) -> const Value& {
      TORCH_CHECK(i < arguments->items.size(), "a tensor lacks an argument");
      return arguments->items[i];
    };
    switch (function) {
      case Function::ordered_dict:
        TORCH_CHECK(arguments->items.empty(), "the pickle makes a dictionary from arguments");
        return push(std::make_shared<Dict>());
      case Function::rebuild_parameter:
        return push(get<std::shared_ptr<const StoredTensor>>(argument(0)));
      case Function::rebuild_tensor: {
        const auto storage = get<Storage>(argument(0));
        StoredTensor tensor{std::string(storage.name), storage.dtype,        storage.size,
                            get<int64_t>(argument(1)), numbers(argument(2)), numbers(argument(3))};
        TORCH_CHECK(is_within_storage(tensor), "a tensor of sizes ", at::IntArrayRef(tensor.sizes),
                    ", strides ", at::IntArrayRef(tensor.strides), " and offset ", tensor.offset,
                    " lies outside its storage of ", tensor.storage_size, " elements");
        return push(std::make_shared<const StoredTensor>(std::move(tensor)));
      }
    }
  }

  static std::vector<int64_t> numbers(const Value& value) {
    const auto tuple = get<std::shared_ptr<Tuple>>(value);
    TORCH_CHECK(tuple->items.size() <= 64, "a tensor has ", tuple->items.size(), " dimensions");
    std::vector<int64_t> result;
    for (const Value& item : tuple->items) {
      result.push_back(get<int64_t>(item));
    }
    return result;
  }

  std::string_view pickle_;
  size_t position_ = 0;
  std::vector<Value> stack_;
  std::unordered_map<uint32_t, Value> memo_;
};

std::string record(caffe2::serialize::PyTorchStreamReader& archive,
                   const std::string& name,
                   size_t limit) {
  const size_t size = archive.getRecordSize(name);
  TORCH_CHECK(size <= limit, name, " has ", size, " bytes, more than the file");
  const auto bytes = std::get<0>(archive.getRecord(name));
  return {static_cast<const char*>(bytes.get()), size};
}

}  // namespace

StateFile::StateFile(const std::string& path)
    : archive_(path), size_(std::filesystem::file_size(path)) {
  if (archive_.hasRecord("byteorder")) {
    TORCH_CHECK(record(archive_, "byteorder", size_) == "little", path,
                " is not in little-endian order");
  }
  const std::string pickle = record(archive_, "data.pkl", size_);
  try {
    tensors_ = Unpickler(pickle).run();
  } catch (c10::Error& error) {
    error.add_context(path + " is not a state dictionary that torch.save wrote, or is damaged");
    throw;
  }
}

at::Tensor StateFile::read(const StoredTensor& tensor) {
  const auto bytes = storage(tensor);
  auto* first = static_cast<char*>(bytes->get()) +
                tensor.offset * static_cast<int64_t>(c10::elementSize(tensor.dtype));
  return at::from_blob(first, tensor.sizes, tensor.strides, [bytes](void*) {}, tensor.dtype);
}

// torch.save does not compress: a record has the bytes of its storage. The size is checked against
// the file and the tensors before any memory is allocated.
std::shared_ptr<at::DataPtr> StateFile::storage(const StoredTensor& tensor) {
  const std::string name = "data/" + tensor.storage;
  const size_t item = c10::elementSize(tensor.dtype);
  const size_t size = archive_.getRecordSize(name);
  TORCH_CHECK(
      size <= size_ && size % item == 0 && size / item == static_cast<size_t>(tensor.storage_size),
      "storage ", tensor.storage, " has ", size, " bytes instead of ", tensor.storage_size,
      " times ", item, " within a file of ", size_);
  auto& bytes = storages_[tensor.storage];
  if (!bytes) {
    bytes = std::make_shared<at::DataPtr>(std::get<0>(archive_.getRecord(name)));
  }
  return bytes;
}

}  // namespace peer::nn
