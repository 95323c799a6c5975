"""What other trainers call things (kohya's scripts, SimpleTuner, OneTrainer, ai-toolkit, diffusers), and what they are here."""

_STEPS = "train.steps, in steps: an epoch is the number of images / train.batch"
KEYS = {
    _STEPS: "epochs epoch num_epochs num_train_epochs max_train_epochs",
    "train.steps": "max_train_steps num_train_steps max_steps total_steps",
    "train.lr": "learning_rate unet_lr transformer_lr",
    "train.batch, of all devices and accumulated steps together": "batch_size train_batch_size global_batch_size",
    "train.batch / train.micro_batch": "gradient_accumulation_steps gradient_accumulation accumulate_grad_batches",
    "train.schedule": "lr_scheduler lr_scheduler_type learning_rate_scheduler",
    "train.warmup": "warmup_steps lr_warmup_steps learning_rate_warmup_steps warmup_ratio lr_warmup",
    "train.betas": "adam_beta1 adam_beta2 beta1 beta2 adam_betas",
    "train.weight_decay": "adam_weight_decay decay",
    "train.max_grad_norm": "grad_clip clip_grad_norm gradient_clip gradient_clip_val max_gradient_norm",
    "train.precision": "mixed_precision train_dtype weight_dtype dtype save_dtype save_precision full_bf16 full_fp16",
    "train.attention": "xformers sdpa attention_mechanism flash_attention attn_mode use_xformers",
    "train.compile": "torch_compile",
    "train.offload_activations": "cpu_offload_checkpointing",
    "base.swap, or base.quant": "low_vram lowram highvram blocks_to_swap block_swap cpu_offload enable_model_cpu_offload",
    "data.sets.weight, a set's share of the samples": "repeats num_repeats dataset_repeats repeat",
    "data.sets.path": "train_data_dir instance_data_dir instance_data_root image_dir image_folder folder_path datasets dataset "
    "concepts data_backend_config",
    "data.sets.captions": "caption_ext caption_extension caption_column caption_strategy",
    "data.sets.file_column": "image_column file_name_column",
    "data.sets.split": "dataset_split split_name train_split",
    "data.resolutions, a list": "resolution image_size img_size resize_to min_bucket_reso max_bucket_reso bucket_reso_steps",
    "data.held_out": "validation_split val_split eval_split",
    "data.crops": "enable_bucket bucketing aspect_ratio_bucketing center_crop random_crop crop_style crop_aspect",
    "data.cache; everything is encoded once": "cache_latents cache_latents_to_disk vae_cache cache_text_encoder_outputs "
    "cache_text_embeddings",
    "not needed: data.cache is read ahead by itself": "dataloader_num_workers max_data_loader_n_workers num_workers",
    "not here: captions stand beside images; data.missing_captions says what if not": "instance_prompt class_prompt",
    "not here: give such images as another of data.sets with a data.sets.weight of its own": "with_prior_preservation "
    "prior_loss_weight reg_data_dir class_data_dir",
    "data.caption_dropout": "caption_dropout_rate caption_dropout_probability cond_dropout proportion_empty_prompts",
    "model.path": "pretrained_model_name_or_path pretrained_model name_or_path base_model model_name unet_path",
    "model.family": "model_family arch architecture",
    "model.components": "ae clip_l clip_g t5xxl vae vae_path text_encoder tokenizer",
    "model.guidance": "guidance_value flux_guidance_value flux_guidance_mode",
    "model.prediction": "prediction_type v_parameterization model_prediction_type",
    "model.text_length": "max_token_length tokenizer_max_length max_sequence_length t5xxl_max_token_length",
    "base.quant": "quantize quantization base_model_precision load_in_8bit load_in_4bit fp8_base weight_quantization",
    "adapter.kind and the rest of [adapter]": "network lora lycoris network_args lycoris_config",
    "adapter.kind": "network_module network_type lora_type model_type algo lycoris_algo",
    "adapter.targets.rank": "network_dim lora_rank network_rank linear lora_r",
    "not needed: a LoRA's alpha is adapter.targets.rank": "network_alpha lora_alpha linear_alpha",
    "adapter.targets.pattern": "target_modules lora_target_modules only_if_contains",
    "train.min_snr, of families that predict noise; flow matching weighs by timesteps.density": "min_snr_gamma snr_gamma",
    "not here: flow matching's loss, in which timesteps.density weighs": "noise_offset loss_weighting",
    "not here: train.objective says what the squared error is taken of": "loss_type huber_c noise_scheduler",
    "not here: text encoders stay as they are; adapter.targets.pattern names layers of the denoiser": "te_lr text_encoder_lr "
    "train_text_encoder network_train_unet_only train_unet",
    "not here: adapter.kind is 'lokr' or 'lora'": "use_dora use_peft_lora",
    "not here: images are taken as they are, cut by data.crops": "flip_aug color_aug random_flip horizontal_flip",
    "not here: captions are taken as they are, but for data.caption_dropout": "shuffle_caption shuffle_tokens keep_tokens "
    "caption_prefix trigger_word trigger tag_dropout",
    "timesteps.density": "timestep_sampling timestep_type weighting_scheme timestep_distribution flow_use_beta_schedule",
    "timesteps.mean, which in diffusers' scripts has the other sign, and timesteps.std": "logit_mean logit_std",
    "timesteps.shift": "discrete_flow_shift flow_shift flow_schedule_shift timestep_shift",
    "snapshot.ema, and dedistill posthoc after training": "use_ema ema_decay ema_config",
    "snapshot.every for weights to use, checkpoint.every to continue from": "save save_every save_steps save_every_n_steps "
    "checkpointing_steps checkpoint_steps save_every_n_epochs",
    "checkpoint.keep": "checkpoints_total_limit save_total_limit max_step_saves_to_keep",
    "not needed: the same command continues (run.resume)": "resume_from_checkpoint resume_from",
    "run.name": "output_name project_name job_name",
    "not needed: a recipe is one process, whose name is run.name": "process job",
    "not in a recipe: dedistill launch starts processes, which share train.batch": "num_gpus gpus num_processes devices device "
    "train_device",
    "run.out": "output_dir training_folder save_folder logging_dir",
    "log.wandb; every number is in metrics.jsonl of run.out as well": "tensorboard report_to log_with logger tracker use_wandb",
    "log.every": "logging_steps log_every",
    "validate.every": "eval_steps eval_every",
    "sample.steps": "sample_steps num_inference_steps validation_num_inference_steps",
    "sample.solver": "sampler sample_sampler",
    "preview.every": "sample_every sample_every_n_steps validation_steps validation_epochs",
    "preview.prompts": "sample_prompts validation_prompt validation_prompts user_prompt_library",
    "preview.cfgs": "guidance_scale cfg_scale validation_guidance",
    "sample.negative": "negative_prompt validation_negative_prompt",
}
"""What to say -> names of others, in small letters, that are answered so."""
VALUES = {
    "train.optimizer": {
        "nothing here finds its own rate: take 'adamw' or 'adamw_bf16', and set train.lr": "prodigy dadaptation dadaptadam",
        "'adamw_bf16' is the one that saves memory": "adamw8bit adamw_8bit pagedadamw8bit adafactor lion lion8bit came",
        "take 'adamw'": "adam sgd radam optimi_adamw",
    },
    "train.lr": {"Prodigy's 1 is a factor, this is the rate itself: usually 1e-5 to 1e-3": "1 1.0"},
    "train.schedule": {
        "take 'constant' and set train.warmup": "constant_with_warmup",
        "take 'cosine'": "cosine_with_restarts cosine_annealing",
        "take 'linear'": "polynomial",
    },
    "train.precision": {"take 'bf16'": "bfloat16 fp16 float16 half mixed", "take 'fp32'": "no float32 float full"},
    "timesteps.density": {
        "take 'logit_normal'": "sigmoid lognorm lognormal",
        "take 'logit_normal' and set timesteps.shift = 'auto'": "flux_shift",
    },
    "base.quant": {
        "there is no storage of 4 bits, which were measured to cost quality (docs/tricks.md): take 'int8'": "int4 nf4 fp4 4bit "
        "int4-quanto q4_0 uint4",
        "take 'int8'": "8bit int8-torchao",
        "take 'fp8', or 'int8', which is nearer": "float8 fp8-quanto qfloat8 float8_e4m3fn",
    },
    "adapter.kind": {
        "take 'lokr' or 'lora'": "loha locon dora oft boft ia3 lycoris",
        "to train the whole network leave the table [adapter] out": "full none finetune",
    },
    "data.source": {"take 'pictures'": "images image folder local webdataset dreambooth"},
}
"""Of keys: what to say -> values of others that are answered so."""


def answer_to(name: str) -> str:
    """What the key ``name`` of another trainer is here; empty for one that is not known."""
    found = _find(KEYS, name.replace("-", "_"))
    return f"what others call so is {found}" if found and not found.startswith("not") else found


def answer_to_value(key: str, value: object) -> str:
    """What to take in place of ``value``, which another trainer knows; empty for one that is not known."""
    return _find(VALUES.get(key, {}), str(value).partition("(")[0]) if isinstance(value, str | float) or value == 1 else ""


def _find(table: dict[str, str], name: str) -> str:
    return next((answer for answer, names in table.items() if name.lower() in names.split()), "")
