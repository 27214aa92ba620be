// A client as a team that writes C++ would have it, with the classes that protoc makes of our protos.
//
//   client ADDRESS infer|say ARGUMENT COUNT IN_FLIGHT TIMEOUT_MS [KEY VALUE]...
//
// `infer` asks the model ARGUMENT by the Open Inference Protocol for x = [[number of the call, 2, 3]]; `say` sends the
// text ARGUMENT to task 12 as a SeldonMessage. All calls go over one channel, each with the metadata KEY VALUE.
//
// What came of each call is a line of words with tabs between: its number, the code, the status message, the answer.
// Trailing metadata follow, a line each: nothing, the key, and the value in hexadecimal.

#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <grpcpp/grpcpp.h>

#include "inference.grpc.pb.h"
#include "seldon.grpc.pb.h"

using Words = std::vector<std::string>;

template <typename Answer>
struct Call {
  int number;
  grpc::ClientContext context;
  grpc::Status status;
  Answer answer;
  std::unique_ptr<grpc::ClientAsyncResponseReader<Answer>> reader;
};

template <typename Answer>
void print(const Call<Answer>& call, const std::string& answer) {
  std::printf("%d\t%d\t%s\t%s\n", call.number, call.status.error_code(), call.status.error_message().c_str(),
              answer.c_str());
  for (const auto& [key, value] : call.context.GetServerTrailingMetadata()) {
    std::printf("\t%.*s\t", static_cast<int>(key.size()), key.data());
    for (const char byte : value) std::printf("%02x", static_cast<unsigned char>(byte));
    std::printf("\n");
  }
}

// Makes `count` calls, at most `in_flight` at one time, and prints each as it ends.
template <typename Answer>
void run(int count, int in_flight, int timeout_ms, const Words& metadata,
         const std::function<std::unique_ptr<grpc::ClientAsyncResponseReader<Answer>>(
             int, grpc::ClientContext*, grpc::CompletionQueue*)>& start,
         const std::function<std::string(const Answer&)>& text) {
  grpc::CompletionQueue queue;
  int begun = 0;
  const auto begin = [&] {
    auto* call = new Call<Answer>();
    call->number = begun++;
    call->context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(timeout_ms));
    for (size_t i = 0; i + 1 < metadata.size(); i += 2) call->context.AddMetadata(metadata[i], metadata[i + 1]);
    call->reader = start(call->number, &call->context, &queue);
    call->reader->Finish(&call->answer, &call->status, call);
  };
  while (begun < count && begun < in_flight) begin();
  void* tag;
  bool ok;
  for (int ended = 0; ended < count && queue.Next(&tag, &ok); ++ended) {
    const std::unique_ptr<Call<Answer>> call(static_cast<Call<Answer>*>(tag));
    print(*call, text(call->answer));
    if (begun < count) begin();
  }
}

std::string values(const inference::ModelInferResponse& answer) {
  std::string text;
  for (const std::string& raw : answer.raw_output_contents()) {
    std::vector<float> numbers(raw.size() / sizeof(float));
    std::memcpy(numbers.data(), raw.data(), numbers.size() * sizeof(float));
    for (const float number : numbers) text += (text.empty() ? "" : " ") + std::to_string(number);
  }
  return text;
}

int main(int argc, char** argv) {
  const Words words(argv + 1, argv + argc);
  if (words.size() < 6) return 2;
  const std::string &method = words[1], &argument = words[2];
  const int count = std::stoi(words[3]), in_flight = std::stoi(words[4]), timeout_ms = std::stoi(words[5]);
  const Words metadata(words.begin() + 6, words.end());
  const auto channel = grpc::CreateChannel(words[0], grpc::InsecureChannelCredentials());
  if (method == "infer") {
    const auto stub = inference::GRPCInferenceService::NewStub(channel);
    run<inference::ModelInferResponse>(
        count, in_flight, timeout_ms, metadata,
        [&](int number, grpc::ClientContext* context, grpc::CompletionQueue* queue) {
          inference::ModelInferRequest request;
          request.set_model_name(argument);
          auto* input = request.add_inputs();
          input->set_name("x");
          input->set_datatype("FP32");
          input->add_shape(1);
          input->add_shape(3);
          const float x[] = {static_cast<float>(number), 2, 3};
          request.add_raw_input_contents(x, sizeof x);
          return stub->AsyncModelInfer(context, request, queue);
        },
        values);
  } else {
    const auto stub = seldon::protos::Model::NewStub(channel);
    run<seldon::protos::SeldonMessage>(
        count, in_flight, timeout_ms, metadata,
        [&](int, grpc::ClientContext* context, grpc::CompletionQueue* queue) {
          seldon::protos::SeldonMessage request;
          (*request.mutable_meta()->mutable_tags())["taskId"].set_number_value(12);
          request.set_strdata(argument);
          return stub->AsyncPredict(context, request, queue);
        },
        [](const seldon::protos::SeldonMessage& answer) { return answer.strdata(); });
  }
}
