//! Tokenizers from GGUF metadata: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{NFC, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, SplitDelimiterBehavior};

use super::gguf::Gguf;
use super::{HostError, HostResult};

/// How Qwen2 cuts text before BPE (its `tokenizer.json`).
const SPLIT_QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// How Llama 3 cuts text: digits in threes.
const SPLIT_LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Texts of tokens that end an answer, whatever else the metadata say.
const END_OF_TURN: [&str; 5] = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>", "</s>"];

/// Token types of GGUF.
const TYPE_UNKNOWN: i64 = 2;
const TYPE_CONTROL: i64 = 3;
const TYPE_USER_DEFINED: i64 = 4;

/// Text to tokens and back.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
    ends: Vec<u32>,
}

impl Tokenizer {
    /// Builds the tokenizer that a model file describes.
    ///
    /// # Errors
    /// [`HostError::Field`] for a kind of tokenizer that is not supported, [`HostError::Tokenizer`] for a broken one.
    pub fn from_gguf(gguf: &Gguf) -> HostResult<Self> {
        let tokens = texts(gguf, "tokenizer.ggml.tokens")?
            .ok_or_else(|| HostError::field("tokenizer.ggml.tokens", "missing", "a list of texts"))?;
        let mut inner = match gguf.text("tokenizer.ggml.model")? {
            Some("gpt2") => byte_level(gguf, &tokens)?,
            Some("llama") => sentence_piece(gguf, &tokens)?,
            other => {
                return Err(HostError::field(
                    "tokenizer.ggml.model",
                    other.unwrap_or("missing"),
                    "gpt2 or llama",
                ));
            }
        };
        let types = gguf.list("tokenizer.ggml.token_type")?.unwrap_or_default();
        let kind = |value: &Value| value.to_i64().or_else(|_| value.to_i32().map(i64::from)).unwrap_or(0);
        let of_type = |wanted: &[i64], special: bool| -> Vec<AddedToken> {
            let chosen = types.iter().zip(&tokens).filter(|(t, _)| wanted.contains(&kind(t)));
            chosen.map(|(_, text)| AddedToken::from(text.clone(), special).normalized(false)).collect()
        };
        inner.add_special_tokens(of_type(&[TYPE_UNKNOWN, TYPE_CONTROL], true)).map_err(refuse)?;
        inner.add_tokens(of_type(&[TYPE_USER_DEFINED], false)).map_err(refuse)?;
        let id = |field: &str| -> HostResult<Option<u32>> {
            Ok(gguf.count(&format!("tokenizer.ggml.{field}"))?.and_then(|id| u32::try_from(id).ok()))
        };
        let mut ends: Vec<u32> = END_OF_TURN.iter().filter_map(|text| inner.token_to_id(text)).collect();
        ends.extend([id("eos_token_id")?, id("eot_token_id")?].into_iter().flatten());
        let bos = if gguf.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(false) {
            id("bos_token_id")?
        } else {
            None
        };
        Ok(Self { inner, bos, ends })
    }

    /// Tokens of a text. Control tokens written out in the text, as chat templates do, become those tokens; the model's start token is put before
    /// the first where the model wants one and the text does not bring it.
    ///
    /// # Errors
    /// [`HostError::Tokenizer`].
    pub fn encode(&self, text: &str) -> HostResult<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(refuse)?;
        let mut ids = encoding.get_ids().to_vec();
        if let Some(bos) = self.bos.filter(|bos| ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Tokens of a text that continues another one: no start token.
    ///
    /// # Errors
    /// [`HostError::Tokenizer`].
    pub fn encode_more(&self, text: &str) -> HostResult<Vec<u32>> {
        Ok(self.inner.encode_fast(text, false).map_err(refuse)?.get_ids().to_vec())
    }

    /// Text of tokens, control tokens left out.
    ///
    /// # Errors
    /// [`HostError::Tokenizer`].
    pub fn decode(&self, ids: &[u32]) -> HostResult<String> {
        self.inner.decode(ids, true).map_err(refuse)
    }

    /// Whether the token ends an answer.
    #[must_use]
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.contains(&id)
    }

    /// A decoder that gives text token by token, whole characters only.
    #[must_use]
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, ids: Vec::new(), prefix: 0, emitted: 0 }
    }
}

/// Text of a growing run of tokens.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Tokens before this one only give context: their text is out.
    prefix: usize,
    /// Tokens before this one are out.
    emitted: usize,
}

impl TextStream<'_> {
    /// The text that `id` completes; empty while a character is incomplete.
    ///
    /// # Errors
    /// [`HostError::Tokenizer`].
    pub fn push(&mut self, id: u32) -> HostResult<String> {
        self.ids.push(id);
        // Decoders treat the first token apart (leading spaces), so the new text is what a decoded run gains.
        let before = self.tokenizer.decode(&self.ids[self.prefix..self.emitted])?;
        let after = self.tokenizer.decode(&self.ids[self.prefix..])?;
        if after.len() <= before.len() || after.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        (self.prefix, self.emitted) = (self.emitted, self.ids.len());
        Ok(after.get(before.len()..).unwrap_or_default().to_owned())
    }
}

/// Byte-level BPE with the split rule that `tokenizer.ggml.pre` names.
fn byte_level(gguf: &Gguf, tokens: &[String]) -> HostResult<tokenizers::Tokenizer> {
    let merges = texts(gguf, "tokenizer.ggml.merges")?
        .ok_or_else(|| HostError::field("tokenizer.ggml.merges", "missing", "a list of texts"))?
        .into_iter()
        .map(|merge| match merge.split_once(' ') {
            Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
            None => Err(HostError::field("tokenizer.ggml.merges", merge, "two texts with a space between")),
        })
        .collect::<HostResult<Vec<_>>>()?;
    let split = |pattern: &str| -> HostResult<PreTokenizerWrapper> {
        let pattern = SplitPattern::Regex(pattern.into());
        Ok(Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(refuse)?.into())
    };
    let pre = gguf.text("tokenizer.ggml.pre")?.unwrap_or("gpt-2");
    let (pre_tokenizer, nfc) = match pre {
        "qwen2" => (vec![split(SPLIT_QWEN2)?, ByteLevel::new(false, true, false).into()], true),
        "llama-bpe" | "llama3" | "smaug-bpe" => {
            (vec![split(SPLIT_LLAMA3)?, ByteLevel::new(false, true, false).into()], false)
        }
        "smollm" => (vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()], false),
        "gpt-2" | "gpt2" | "default" => (vec![ByteLevel::new(false, true, true).into()], false),
        other => {
            let known = "qwen2, llama-bpe, smaug-bpe, smollm, gpt-2 or default";
            return Err(HostError::field("tokenizer.ggml.pre", other, known));
        }
    };
    let mut inner = bpe(tokens, merges, |builder| builder)?;
    if nfc {
        inner.with_normalizer(Some(NFC)).map_err(refuse)?;
    }
    inner.with_pre_tokenizer(Some(PreTokenizers::new(pre_tokenizer)));
    inner.with_decoder(Some(ByteLevel::new(false, true, true)));
    Ok(inner)
}

/// SentencePiece BPE: a pair merges where the joined text is a token, tokens of larger score first.
fn sentence_piece(gguf: &Gguf, tokens: &[String]) -> HostResult<tokenizers::Tokenizer> {
    use tokenizers::decoders::{byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence};
    let scores = gguf
        .list("tokenizer.ggml.scores")?
        .ok_or_else(|| HostError::field("tokenizer.ggml.scores", "missing", "a list of numbers"))?;
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, text)| (text.as_str(), id)).collect();
    let mut merges: Vec<(f32, usize, usize)> = Vec::new();
    for (text, score) in tokens.iter().zip(scores) {
        let score = score.to_f32()?;
        let cuts = text.char_indices().skip(1).map(|(at, _)| text.split_at(at));
        merges.extend(cuts.filter_map(|(l, r)| Some((score, *ids.get(l)?, *ids.get(r)?))));
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let merges = merges.into_iter().map(|(_, l, r)| (tokens[l].clone(), tokens[r].clone())).collect();
    let unknown = gguf.count("tokenizer.ggml.unknown_token_id")?.and_then(|id| tokens.get(id)).cloned();
    let mut inner = bpe(tokens, merges, |builder| {
        let builder = builder.byte_fallback(true).fuse_unk(true);
        match unknown {
            Some(unknown) => builder.unk_token(unknown),
            None => builder,
        }
    })?;
    let space = Replace::new(" ", "\u{2581}").map_err(refuse)?;
    let normalizer: NormalizerWrapper = if gguf.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true) {
        Normalizers::new(vec![Prepend::new("\u{2581}".into()).into(), space.into()]).into()
    } else {
        space.into()
    };
    inner.with_normalizer(Some(normalizer)).map_err(refuse)?;
    let back = Replace::new("\u{2581}", " ").map_err(refuse)?;
    let decoders: Vec<DecoderWrapper> = vec![back.into(), ByteFallback::new().into(), Fuse::new().into()];
    inner.with_decoder(Some(Sequence::new(decoders)));
    Ok(inner)
}

fn bpe(
    tokens: &[String],
    merges: Vec<(String, String)>,
    options: impl FnOnce(tokenizers::models::bpe::BpeBuilder) -> tokenizers::models::bpe::BpeBuilder,
) -> HostResult<tokenizers::Tokenizer> {
    let vocab: tokenizers::models::bpe::Vocab =
        tokens.iter().enumerate().map(|(id, text)| (text.clone(), id as u32)).collect();
    let model = options(BPE::builder().vocab_and_merges(vocab, merges)).build().map_err(refuse)?;
    Ok(tokenizers::Tokenizer::new(model))
}

fn texts(gguf: &Gguf, field: &str) -> HostResult<Option<Vec<String>>> {
    let Some(items) = gguf.list(field)? else { return Ok(None) };
    let text = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        other => Err(HostError::field(field, format!("{other:?}"), "a list of texts")),
    };
    items.iter().map(text).collect::<HostResult<Vec<_>>>().map(Some)
}

fn refuse(error: impl std::fmt::Display) -> HostError {
    HostError::Tokenizer(error.to_string())
}
