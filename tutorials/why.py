import torch
from accelerate import Accelerator
from captum.attr import ShapleyValueSampling
from captum_llm_ext import CorpusBaselines, GenerationAttribution, TextSegmentInput, load_demo

accelerator = Accelerator(cpu=not torch.cuda.is_available())
model, tokenizer, texts = load_demo()
model.to(accelerator.device)
prompt = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
inp = TextSegmentInput(prompt, tokenizer, "word", baselines=CorpusBaselines(texts))
attribution = GenerationAttribution(
    ShapleyValueSampling(model), tokenizer, accelerator=accelerator
)
result = attribution.attribute(inp, gen_args={"max_new_tokens": 40}, n_samples=50)
if accelerator.is_main_process:
    rows = result.provenance["rows_by_process"]
    print(f"{sum(rows)} rows; processes: {len(rows)}")
    print(*result.why("surfing", 2), sep="\n")
