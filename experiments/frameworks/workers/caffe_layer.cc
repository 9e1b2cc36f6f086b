// One layer of Caffe on arrays in memory: what it computes, and the gradient of its first input.
#include <google/protobuf/text_format.h>

#include "caffe/layer_factory.hpp"
#include "caffe/layers/softmax_layer.hpp"

namespace caffe {
REGISTER_LAYER_CLASS(Softmax);  // in Caffe its file of all layers does this
}

extern "C" void run(const char* prototxt, int inputs, const int* ranks, const int* shapes, const double* const* arrays,
                    const double* top_gradient, double* top, double* gradient) {
  caffe::LayerParameter parameter;
  CHECK(google::protobuf::TextFormat::ParseFromString(prototxt, &parameter));
  std::vector<caffe::Blob<double>> bottoms(inputs), tops(1);
  std::vector<caffe::Blob<double>*> bottom, result = {&tops[0]};
  for (int n = 0; n < inputs; shapes += ranks[n++]) {
    bottoms[n].Reshape(std::vector<int>(shapes, shapes + ranks[n]));
    std::copy_n(arrays[n], bottoms[n].count(), bottoms[n].mutable_cpu_data());
    bottom.push_back(&bottoms[n]);
  }
  auto layer = caffe::LayerRegistry<double>::CreateLayer(parameter);
  layer->SetUp(bottom, result);
  layer->Forward(bottom, result);
  std::copy_n(tops[0].cpu_data(), tops[0].count(), top);
  std::copy_n(top_gradient, tops[0].count(), tops[0].mutable_cpu_diff());
  std::vector<bool> wanted(inputs, false);
  wanted[0] = true;
  layer->Backward(result, wanted, bottom);
  std::copy_n(bottoms[0].cpu_diff(), bottoms[0].count(), gradient);
}
