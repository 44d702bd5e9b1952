"""What a tensor is for, by families of models whose names are their own."""

from __future__ import annotations

import pytest

from gradscope.checkpoints.tensors import TensorRef
from gradscope.weights.roles import Role, roles

Row = tuple[str, tuple[int, ...], str] | tuple[str, tuple[int, ...], str, str]


def role_of(table: list[Row]) -> dict[str, str]:
    refs = [
        TensorRef(row[0], row[3] if len(row) > 3 else "F32", row[1], "model.safetensors", 0)
        for row in table
    ]
    return {name: role.value for name, role in roles(refs).items()}


FAMILIES: dict[str, list[Row]] = {
    "Llama": [
        ("model.embed_tokens.weight", (32000, 64), "embedding", "BF16"),
        ("model.layers.0.self_attn.q_proj.weight", (64, 64), "linear", "BF16"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (32,), "buffer"),
        ("model.layers.0.mlp.gate_proj.weight", (128, 64), "linear", "BF16"),
        ("model.layers.0.input_layernorm.weight", (64,), "norm-gain", "BF16"),
        ("model.norm.weight", (64,), "norm-gain", "BF16"),
        ("lm_head.weight", (32000, 64), "unembedding", "BF16"),
    ],
    "Llama, original names": [
        ("tok_embeddings.weight", (32000, 64), "embedding"),
        ("layers.0.attention.wq.weight", (64, 64), "linear"),
        ("layers.0.attention_norm.weight", (64,), "norm-gain"),
        ("norm.weight", (64,), "norm-gain"),
        ("rope.freqs", (32,), "vector"),
    ],
    "Qwen": [
        ("model.layers.0.self_attn.q_proj.bias", (64,), "bias"),
        ("model.layers.0.self_attn.q_norm.weight", (64,), "norm-gain"),
        ("visual.patch_embed.proj.weight", (64, 3, 2, 14, 14), "conv"),
        ("visual.merger.mlp.0.weight", (64, 64), "linear"),
    ],
    "GPT-2": [
        ("wte.weight", (50257, 64), "embedding"),
        ("wpe.weight", (1024, 64), "embedding"),
        ("h.0.ln_1.weight", (64,), "norm-gain"),
        ("h.0.ln_1.bias", (64,), "bias"),
        ("h.0.attn.c_attn.weight", (64, 192), "linear"),
        ("h.0.attn.c_attn.bias", (192,), "bias"),
        ("h.0.attn.bias", (1, 1, 1024, 1024), "buffer"),
        ("h.1.attn.bias", (1, 1, 1024, 1024), "buffer", "BOOL"),
        ("h.0.attn.masked_bias", (), "buffer"),
        ("ln_f.weight", (64,), "norm-gain"),
    ],
    "GPT-NeoX": [
        ("gpt_neox.embed_in.weight", (50432, 64), "embedding"),
        ("gpt_neox.layers.0.attention.query_key_value.weight", (192, 64), "linear"),
        ("embed_out.weight", (50432, 64), "unembedding"),
    ],
    "BLOOM": [
        ("word_embeddings.weight", (2048, 64), "embedding"),
        ("word_embeddings_layernorm.weight", (64,), "norm-gain"),
        ("word_embeddings_layernorm.bias", (64,), "bias"),
    ],
    "BERT": [
        ("bert.embeddings.word_embeddings.weight", (30522, 64), "embedding"),
        ("bert.embeddings.position_embeddings.weight", (512, 64), "embedding"),
        ("bert.embeddings.token_type_embeddings.weight", (2, 64), "embedding"),
        ("bert.embeddings.position_ids", (1, 512), "buffer", "I64"),
        ("bert.embeddings.LayerNorm.weight", (64,), "norm-gain"),
        ("bert.embeddings.LayerNorm.bias", (64,), "bias"),
        ("bert.encoder.layer.0.attention.self.query.weight", (64, 64), "linear"),
        ("bert.pooler.dense.weight", (64, 64), "linear"),
        ("cls.predictions.decoder.weight", (30522, 64), "unembedding"),
        ("cls.predictions.bias", (30522,), "bias"),
    ],
    "BERT, from TensorFlow": [
        ("bert.embeddings.LayerNorm.gamma", (64,), "norm-gain"),
        ("bert.embeddings.LayerNorm.beta", (64,), "bias"),
        ("batch_normalization.gamma", (64,), "batch-norm-gain"),
        ("batch_normalization.beta", (64,), "bias"),
        ("batch_normalization.moving_mean", (64,), "running-mean"),
        ("batch_normalization.moving_variance", (64,), "running-var"),
        ("dense.kernel", (64, 64), "linear"),
    ],
    "ALBERT and ELECTRA": [
        ("albert.encoder.embedding_hidden_mapping_in.weight", (64, 32), "linear"),
        ("electra.embeddings_project.weight", (64, 32), "linear"),
    ],
    "T5": [
        ("shared.weight", (32128, 64), "embedding"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", (64, 64), "linear"),
        (
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            (32, 8),
            "embedding",
        ),
        ("encoder.block.0.layer.0.layer_norm.weight", (64,), "norm-gain"),
        ("encoder.final_layer_norm.weight", (64,), "norm-gain"),
    ],
    "EnCodec": [
        ("quantizer.vq.layers.0._codebook.embed", (1024, 128), "codebook"),
        ("quantizer.vq.layers.0._codebook.embed_avg", (1024, 128), "buffer"),
        ("quantizer.vq.layers.0._codebook.cluster_size", (1024,), "buffer"),
        ("quantizer.vq.layers.0._codebook.inited", (1,), "buffer"),
    ],
    "vector-quantize-pytorch": [
        ("vq._codebook.embed", (1, 512, 64), "codebook"),
        ("vq._codebook.embed_avg", (1, 512, 64), "buffer"),
        ("vq._codebook.cluster_size", (1, 512), "buffer"),
        ("vq._codebook.initted", (), "buffer", "BOOL"),
        ("vq.project_in.weight", (64, 128), "linear"),
    ],
    "VQGAN, VQ-VAE, DAC and Mimi": [
        ("quantize.embedding.weight", (1024, 256), "codebook"),
        ("_vq_vae._embedding.weight", (512, 64), "codebook"),
        ("_vq_vae._ema_w", (512, 64), "buffer"),
        ("_vq_vae._ema_cluster_size", (512,), "buffer"),
        ("quantize_t.embed", (64, 512), "codebook"),
        ("quantizer.quantizers.0.codebook.weight", (1024, 8), "codebook"),
        ("quantizer.quantizers.0.in_proj.weight", (8, 1024, 1), "conv"),
        ("quantizer.layers.0.codebook.embed_sum", (2048, 256), "codebook"),
        ("quantizer.layers.0.codebook.cluster_usage", (2048,), "buffer"),
    ],
    "DBRX": [
        ("transformer.blocks.0.ffn.experts.mlp.w1", (512, 64), "experts"),
        ("transformer.blocks.0.ffn.experts.mlp.w2", (512, 64), "experts"),
        ("transformer.blocks.0.ffn.router.layer.weight", (8, 64), "linear"),
    ],
    "ViT": [
        ("cls_token", (1, 1, 64), "vector"),
        ("pos_embed", (1, 197, 64), "embedding"),
        ("patch_embed.proj.weight", (64, 3, 16, 16), "conv"),
        ("patch_embed.proj.bias", (64,), "bias"),
        ("blocks.0.norm1.weight", (64,), "norm-gain"),
        ("blocks.0.attn.qkv.weight", (192, 64), "linear"),
        ("blocks.0.ls1.gamma", (64,), "layer-scale"),
        ("blocks.0.gamma_1", (64,), "layer-scale"),
        ("head.weight", (1000, 64), "linear"),
        ("head.bias", (1000,), "bias"),
    ],
    "ViT and DINOv2, Hugging Face": [
        ("embeddings.cls_token", (1, 1, 64), "vector"),
        ("embeddings.mask_token", (1, 64), "vector"),
        ("embeddings.register_tokens", (1, 4, 64), "embedding"),
        ("embeddings.position_embeddings", (1, 197, 64), "embedding"),
        ("embeddings.patch_embeddings.projection.weight", (64, 3, 16, 16), "conv"),
        ("encoder.layer.0.layer_scale1.lambda1", (64,), "layer-scale"),
    ],
    "CLIP": [
        ("logit_scale", (), "scalar"),
        ("positional_embedding", (77, 64), "embedding"),
        ("token_embedding.weight", (49408, 64), "embedding"),
        ("text_projection", (64, 64), "linear"),
        ("visual.class_embedding", (64,), "vector"),
        ("visual.conv1.weight", (64, 3, 32, 32), "conv"),
        ("transformer.resblocks.0.attn.in_proj_weight", (192, 64), "linear"),
        ("transformer.resblocks.0.attn.in_proj_bias", (192,), "bias"),
        ("transformer.resblocks.0.ln_1.weight", (64,), "norm-gain"),
        ("attn_mask", (77, 77), "buffer"),
    ],
    "Swin": [
        ("layers.0.blocks.0.attn.relative_position_bias_table", (169, 3), "bias"),
        ("layers.0.blocks.0.attn.relative_position_index", (49, 49), "buffer", "I64"),
        ("layers.0.blocks.1.attn_mask", (64, 49, 49), "buffer"),
        ("layers.0.blocks.1.attn.logit_scale", (3, 1, 1), "scalar"),
        ("layers.0.downsample.norm.weight", (256,), "norm-gain"),
        ("layers.0.downsample.reduction.weight", (128, 256), "linear"),
    ],
    "ConvNeXt": [
        ("stages.0.blocks.0.conv_dw.weight", (96, 1, 7, 7), "depthwise-conv"),
        ("stages.0.blocks.0.gamma", (96,), "layer-scale"),
        ("stages.0.blocks.1.mlp.grn.gamma", (1, 1, 1, 384), "norm-gain"),
        ("stages.0.blocks.1.mlp.grn.beta", (1, 1, 1, 384), "bias"),
    ],
    "ResNet": [
        ("conv1.weight", (64, 3, 7, 7), "conv"),
        ("bn1.weight", (64,), "batch-norm-gain"),
        ("bn1.bias", (64,), "bias"),
        ("bn1.running_mean", (64,), "running-mean"),
        ("bn1.running_var", (64,), "running-var"),
        ("bn1.num_batches_tracked", (), "counter", "I64"),
        ("layer1.0.downsample.1.weight", (64,), "batch-norm-gain"),
        ("layer1.0.downsample.1.running_mean", (64,), "running-mean"),
        ("layer1.0.downsample.1.running_var", (64,), "running-var"),
        ("fc.weight", (1000, 512), "linear"),
    ],
    "MobileNet": [
        ("features.1.conv.0.0.weight", (32, 1, 3, 3), "depthwise-conv"),
        ("features.1.conv.0.1.weight", (32,), "batch-norm-gain"),
        ("features.1.conv.0.1.bias", (32,), "bias"),
        ("features.1.conv.0.1.running_mean", (32,), "running-mean"),
        ("features.1.conv.0.1.running_var", (32,), "running-var"),
        ("classifier.1.weight", (1000, 1280), "linear"),
    ],
    "LoRA, peft": [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", (8, 64), "lora-a"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", (64, 8), "lora-b"),
        ("m.layers.0.q_proj.lora_A.default.weight", (8, 64), "lora-a"),
        ("m.layers.0.q_proj.lora_B.default.weight", (64, 8), "lora-b"),
        ("m.embed_tokens.lora_embedding_A", (8, 32000), "lora-a"),
        ("m.embed_tokens.lora_embedding_B.default", (64, 8), "lora-b"),
        ("m.layers.0.q_proj.lora_magnitude_vector.weight", (64,), "vector"),
    ],
    "LoRA, kohya": [
        ("lora_unet_down_blocks_0_attn_to_q.lora_down.weight", (8, 64), "lora-a"),
        ("lora_unet_down_blocks_0_attn_to_q.lora_up.weight", (64, 8), "lora-b"),
        ("lora_unet_down_blocks_0_attn_to_q.alpha", (), "scalar"),
        ("lora_unet_conv_in.lora_down.weight", (8, 64, 3, 3), "lora-a"),
    ],
    "GPTQ and AWQ": [
        ("model.layers.0.mlp.up_proj.qweight", (8, 64), "packed", "I32"),
        ("model.layers.0.mlp.up_proj.qzeros", (1, 8), "packed", "I32"),
        ("model.layers.0.mlp.up_proj.scales", (1, 64), "scale", "F16"),
        ("model.layers.0.mlp.up_proj.g_idx", (64,), "packed", "I32"),
    ],
    "compressed-tensors": [
        ("model.layers.0.mlp.up_proj.weight_packed", (64, 8), "packed", "I32"),
        ("model.layers.0.mlp.up_proj.weight_scale", (64, 1), "scale", "BF16"),
        ("model.layers.0.mlp.up_proj.weight_shape", (2,), "packed", "I64"),
        ("model.layers.0.mlp.up_proj.weight_zero_point", (64, 1), "packed", "I8"),
        ("model.layers.1.mlp.up_proj.weight", (64, 64), "quantized", "F8_E4M3"),
        ("model.layers.1.mlp.up_proj.input_scale", (), "scale", "BF16"),
    ],
    "NVFP4": [
        ("model.layers.0.mlp.up_proj.weight", (64, 256), "packed", "U8"),
        ("model.layers.0.mlp.up_proj.weight_scale", (64, 32), "scale", "F8_E4M3"),
        ("model.layers.0.mlp.up_proj.weight_scale_2", (), "scale"),
    ],
    "DeepSeek": [
        ("model.layers.0.mlp.up_proj.weight", (256, 128), "quantized", "F8_E4M3"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", (2, 1), "scale"),
        ("model.layers.3.mlp.experts.7.w1.weight", (64, 64), "linear", "BF16"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", (256,), "bias"),
    ],
    "bitsandbytes": [
        ("model.layers.0.mlp.up_proj.weight", (8192, 1), "packed", "U8"),
        ("model.layers.0.mlp.up_proj.weight.absmax", (256,), "scale", "U8"),
        ("model.layers.0.mlp.up_proj.weight.quant_map", (16,), "scale"),
        ("model.layers.0.mlp.up_proj.weight.nested_absmax", (1,), "scale"),
        ("model.layers.0.mlp.up_proj.weight.nested_quant_map", (256,), "scale"),
        (
            "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4",
            (93,),
            "packed",
            "U8",
        ),
        ("model.layers.1.mlp.up_proj.weight", (128, 64), "packed", "I8"),
        ("model.layers.1.mlp.up_proj.SCB", (128,), "scale"),
    ],
    "mixtures of experts": [
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 64, 128), "experts", "BF16"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (8, 128), "bias", "BF16"),
        ("model.layers.0.block_sparse_moe.input_linear.weight", (8, 128, 64), "experts"),
        ("model.layers.0.mlp.router.weight", (8, 64), "linear", "BF16"),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", (64, 64), "linear", "BF16"),
        ("model.layers.1.mlp.experts.down_proj_blocks", (8, 64, 4, 16), "packed", "U8"),
        ("model.layers.1.mlp.experts.down_proj_scales", (8, 64, 4), "scale", "U8"),
    ],
    "recurrent": [
        ("lstm.weight_ih_l0", (256, 64), "recurrent"),
        ("lstm.weight_hh_l0_reverse", (256, 64), "recurrent"),
        ("lstm.bias_ih_l0", (256,), "bias"),
        ("cell.weight_hh", (256, 64), "recurrent"),
    ],
    "Mamba and RWKV": [
        ("backbone.embeddings.weight", (50280, 64), "embedding"),
        ("backbone.layers.0.mixer.A_log", (128, 16), "other"),
        ("backbone.layers.0.mixer.D", (128,), "vector"),
        ("backbone.layers.0.mixer.conv1d.weight", (128, 1, 4), "depthwise-conv"),
        ("blocks.0.att.time_mix_k", (1, 1, 64), "vector"),
    ],
    "Whisper": [
        ("model.encoder.embed_positions.weight", (1500, 64), "embedding"),
        ("model.encoder.conv1.weight", (64, 80, 3), "conv"),
        ("encoder.positional_embedding", (1500, 64), "embedding"),
        ("decoder.token_embedding.weight", (51865, 64), "embedding"),
        ("decoder.mask", (448, 448), "buffer"),
    ],
    "diffusers": [
        ("time_embedding.linear_1.weight", (256, 64), "linear"),
        ("time_embedding.linear_1.bias", (256,), "bias"),
        ("down_blocks.0.resnets.0.time_emb_proj.weight", (64, 256), "linear"),
        ("down_blocks.0.resnets.0.norm1.weight", (64,), "norm-gain"),
        ("context_embedder.weight", (64, 128), "linear"),
        ("context_embedder.bias", (64,), "bias"),
        ("class_embedding.weight", (1000, 64), "embedding"),
    ],
    "detection": [
        ("query_embed.weight", (100, 64), "embedding"),
        ("class_embed.weight", (92, 64), "linear"),
        ("class_embed.bias", (92,), "bias"),
        ("bbox_embed.layers.0.weight", (64, 64), "linear"),
    ],
    "names that only sound like an embedding": [
        ("embed_dim_proj.weight", (64, 64), "linear"),
        ("embed_dim.weight", (64, 64), "linear"),
        ("embedding_transformation.weight", (64, 64), "linear"),
        ("member.weight", (64, 64), "linear"),
        ("remember.gate.weight", (64, 64), "linear"),
    ],
    "slopes, weight normalisation, optimizers": [
        ("prelu1.weight", (32,), "vector"),
        ("block.act.weight", (32,), "vector"),
        ("contract_norm.weight", (32,), "norm-gain"),
        ("conv.weight_g", (64, 1, 1), "vector"),
        ("conv.weight_v", (64, 32, 3), "conv"),
        ("conv.parametrizations.weight.original0", (64, 1, 1), "vector"),
        ("conv.parametrizations.weight.original1", (64, 32, 3), "conv"),
        ("optimizer.fc.weight.exp_avg", (64, 64), "optimizer-state"),
        ("optimizer.fc.weight.exp_avg_sq", (64, 64), "optimizer-state"),
        ("optimizer.fc.weight.step", (), "counter"),
    ],
    "constants": [
        ("conv.weight", (4, 4), "linear"),
        ("adj", (100, 100), "buffer"),
        ("gcn.layers.0.adj_mx", (100, 100), "buffer"),
        ("gcn.layers.0.weight", (64, 64), "linear"),
        ("gcn.layers.0.bias", (64,), "bias"),
        ("spectrogram.mel_basis", (80, 201), "buffer"),
        ("mel_scale.fb", (201, 80), "buffer"),
        ("logmel.melW", (513, 64), "buffer"),
        ("stft.conv_real.weight", (513, 1, 1024), "buffer"),
        ("stft.forward_basis_buffer", (258, 1, 256), "buffer"),
        ("dct_mat", (64, 64), "buffer"),
        ("blur_kernel", (5, 5), "buffer"),
        ("downsample.blur.kernel", (4, 4), "buffer"),
        ("pool.filt", (16, 1, 3, 3), "buffer"),
        ("synthesis.noise_const", (64, 64), "buffer"),
        ("rope.freqs_cis", (128, 32), "buffer", "C64"),
        ("pos_encoder.pe", (1, 500, 64), "buffer"),
        ("tp._w3j_1_1_0", (3, 3, 1), "buffer"),
        ("smpl.J_regressor", (24, 6890), "buffer"),
        ("smpl.lbs_weights", (6890, 24), "buffer"),
        ("metrics.confmat", (10, 10), "buffer"),
        ("sampler.timesteps", (10, 10), "buffer"),
        ("crf.transitions", (9, 9), "buffer"),
        ("supports.0", (207, 207), "buffer"),
        ("performer.projection_matrix", (256, 64), "buffer"),
    ],
    "the state of an EMA codebook": [
        ("vq.embed", (1, 512, 64), "codebook"),
        ("vq.embed_avg", (1, 512, 64), "buffer"),
        ("vq.cluster_size", (1, 512), "buffer"),
        ("rvq.cluster_size", (4, 512), "buffer"),
        ("vq._ema_w", (512, 64), "buffer"),
        ("vq.ema_embedding", (512, 64), "buffer"),
    ],
    "raw names of layers": [
        ("attn.W_q", (64, 64), "linear"),
        ("blocks.0.attn.W_Q", (8, 64, 16), "conv"),
        ("blocks.0.attn.b_Q", (8, 16), "bias"),
        ("blocks.0.mlp.W_in", (64, 256), "linear"),
        ("attn.Wqkv", (192, 64), "linear"),
        ("to_q.w", (64, 64), "linear"),
        ("mlp.w1", (64, 64), "linear"),
        ("params/Dense_0/kernel", (64, 64), "linear"),
        ("dense/kernel:0", (64, 64), "linear"),
        ("enc_w_ih", (768, 256), "linear"),
        ("linear_0.w_0", (64, 64), "linear"),
        ("fc1_weight", (64, 64), "linear"),
        ("ssm.x_proj_weight", (64, 64), "linear"),
        ("moe.w13_weight", (8, 64, 64), "experts"),
        ("q_proj.hada_w1_a", (64, 4), "adapter"),
        ("q_proj.lokr_w2_b", (4, 64), "adapter"),
        ("weights.0", (64, 64), "linear"),
        ("arr_0", (64, 64), "linear"),
        ("0", (64, 64), "linear"),
        ("onnx::MatMul_123", (64, 64), "linear"),
    ],
    "trained, but multiplied by no layer": [
        ("decoder.query", (100, 64), "other"),
        ("perceiver.latents", (32, 64), "other"),
        ("prompt_learner.ctx", (16, 64), "other"),
        ("att.time_faaaa", (8, 64), "other"),
        ("attn.rel_pos_h", (27, 64), "other"),
        ("gat.att_src", (1, 8, 64), "other"),
    ],
    "odd shapes": [
        ("fc.weight", (1, 64), "linear"),
        ("lin0.model.1.weight", (1, 64, 1, 1), "conv"),
        ("offset", (), "scalar"),
        ("codebook", (4096, 8), "codebook"),
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_roles_of_a_family(family: str) -> None:
    table = FAMILIES[family]
    assert role_of(table) == {row[0]: row[2] for row in table}


def test_a_vocabulary_is_known_by_its_shape_when_its_name_says_nothing() -> None:
    assert role_of([("w.weight", (32000, 64), "")]) == {"w.weight": "embedding"}
    assert role_of([("w.weight", (4000, 64), "")]) == {"w.weight": "linear"}


def test_a_batch_norm_is_known_by_its_siblings_whatever_it_is_called() -> None:
    found = role_of([("a.3.weight", (8,), ""), ("a.3.running_var", (8,), "")])
    assert found["a.3.weight"] == "batch-norm-gain"
    assert role_of([("a.3.weight", (8,), "")]) == {"a.3.weight": "norm-gain"}


def test_gamma_beside_beta_is_a_norm_gain_and_alone_a_layer_scale() -> None:
    assert role_of([("x.gamma", (8,), ""), ("x.beta", (8,), "")])["x.gamma"] == "norm-gain"
    assert role_of([("x.gamma", (8,), "")])["x.gamma"] == "layer-scale"


def test_every_tensor_has_a_role() -> None:
    shapes: list[tuple[int, ...]] = [(), (0,), (1,), (5,), (5, 5), (5, 5, 5), (2,) * 4, (2,) * 6]
    dtypes = ("F32", "BF16", "F8_E4M3", "F4", "I64", "U8", "BOOL", "C64")
    table: list[Row] = [
        (f"x.{name}{dtype}{len(shape)}", shape, "", dtype)
        for name in ("weight", "bias", "thing", "")
        for shape in shapes
        for dtype in dtypes
    ]
    assert set(role_of(table).values()) <= {role.value for role in Role}


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "role"),
    [
        ("conv.weight", (2, 1, 3, 3), "F32", "depthwise-conv"),
        ("conv.weight", (1, 1, 3, 3), "F32", "conv"),
        ("conv.weight", (4, 2, 3, 3, 3), "F32", "conv"),
        ("conv.weight", (2, 2, 2, 2, 2, 2), "F32", "other"),
        ("rnn.weight_hh_l0", (8, 2), "F32", "recurrent"),
        ("rnn.bias_hh_l0", (8,), "F32", "bias"),
        ("h.0.attn.bias", (1, 1, 8, 8), "F32", "buffer"),
        ("x.codes", (64, 64), "I32", "buffer"),
        ("x.codes", (64, 65), "I32", "packed"),
        ("x.codes", (5000,), "I32", "buffer"),
        ("w.weight", (16_000, 1000), "F32", "embedding"),
        ("w.weight", (16_000, 1001), "F32", "linear"),
        ("w.weight", (15_999, 10), "F32", "linear"),
        ("shared.weight", (10, 9), "F32", "embedding"),
        ("shared.weight", (9, 9), "F32", "linear"),
        ("x.gamma", (1, 1, 8), "F32", "layer-scale"),
        ("x.gamma", (2, 8), "F32", "linear"),
        ("x.position_bias", (1, 8), "F32", "bias"),
        ("x.offset", (8, 1), "F32", "vector"),
        ("fc.weight", (8, 1), "F32", "linear"),
        ("step", (1,), "I64", "counter"),
        ("step", (2,), "I64", "buffer"),
        ("a.weight_scale", (4,), "U8", "scale"),
        ("a.weight_scale", (4,), "I8", "buffer"),
        ("a.running_mean", (4,), "I64", "buffer"),
        ("a.qweight", (4, 4), "F32", "linear"),
        ("moe.w1", (4, 8, 8), "F32", "experts"),
        ("prelu.weight", (8,), "F32", "vector"),
        ("q_proj.lora_magnitude_vector.weight", (8,), "F32", "vector"),
    ],
)
def test_a_shape_or_a_type_decides_where_a_name_does_not(
    name: str, shape: tuple[int, ...], dtype: str, role: str
) -> None:
    assert role_of([(name, shape, role, dtype)]) == {name: role}


def test_a_table_beside_a_bias_is_a_matrix() -> None:
    table: list[Row] = [("word_embedding.weight", (50, 8), ""), ("word_embedding.bias", (50,), "")]
    assert role_of(table[:1]) == {"word_embedding.weight": "embedding"}
    assert role_of(table)["word_embedding.weight"] == "linear"


def test_a_name_that_nobody_knows_is_a_matrix_only_beside_a_bias_that_fits_it() -> None:
    phi, bias = ("a.phi", (64, 32), ""), ("a.bias", (64,), "")
    assert role_of([phi])["a.phi"] == "buffer"
    assert role_of([phi, bias])["a.phi"] == "linear"
    assert role_of([phi, ("a.bias", (65,), "")])["a.phi"] == "buffer"
    assert role_of([phi, bias, ("a.weight", (64, 64), "")])["a.phi"] == "buffer"


def test_a_trained_layer_beside_an_stft_has_a_bias() -> None:
    table: list[Row] = [("stft.conv.weight", (64, 1, 9), ""), ("stft.conv.bias", (64,), "")]
    assert role_of(table[:1]) == {"stft.conv.weight": "buffer"}
    assert role_of(table)["stft.conv.weight"] == "depthwise-conv"


def test_a_vector_beside_a_matrix_is_no_gain() -> None:
    table: list[Row] = [("a.scale", (8,), ""), ("a.weight", (8, 8), "")]
    assert role_of(table)["a.scale"] == "vector"
    assert role_of([("a.weight", (8,), "")]) == {"a.weight": "norm-gain"}
    assert role_of([("a.scale", (8,), "")]) == {"a.scale": "vector"}
