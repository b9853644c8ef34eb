//! A model file, opened: decoder, tokenizer, chat template.

use std::path::Path;

use super::chat::{ChatTemplate, Message};
use super::decoder::Decoder;
use super::gguf::Gguf;
use super::tokenizer::Tokenizer;
use super::{HostError, HostResult, ModelConfig};

/// Stands for a question inside a rendered chat; any text that no context contains.
const MARK: &str = "\u{1}question\u{1}";

/// Everything of one GGUF file.
pub struct Model {
    /// Name in reports: `general.name`, else the file's name.
    pub name: String,
    /// Licence as the file states it, else empty.
    pub licence: String,
    /// Weights.
    pub decoder: Decoder,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Chat template; `None` for base models.
    pub chat: Option<ChatTemplate>,
}

impl Model {
    /// Reads a whole GGUF file.
    ///
    /// # Errors
    /// [`super::HostError`] naming the file, field or tensor that is at fault.
    pub fn open(path: impl AsRef<Path>) -> HostResult<Self> {
        let mut gguf = Gguf::open(path)?;
        let file_name = gguf.path().file_stem().map(|name| name.to_string_lossy().into_owned());
        Ok(Self {
            name: gguf.text("general.name")?.map(str::to_owned).or(file_name).unwrap_or_default(),
            licence: gguf.text("general.license")?.unwrap_or_default().to_owned(),
            tokenizer: Tokenizer::from_gguf(&gguf)?,
            chat: ChatTemplate::from_gguf(&gguf)?,
            decoder: Decoder::load(&mut gguf)?,
        })
    }

    /// The model's shape.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        self.decoder.config()
    }

    /// The texts before and after a question that follows `context` in one user message of the model's chat form; a line
    /// break after it for a model without a chat template. So one context can be run once for many questions.
    ///
    /// # Errors
    /// When the template refuses the message or drops its text.
    pub fn chat_around(&self, context: &str) -> HostResult<(String, String)> {
        let Some(chat) = &self.chat else { return Ok((format!("{context}\n\n"), "\n".to_owned())) };
        let content = format!("{context}\n\n{MARK}");
        let rendered = chat.render(&[Message { role: "user", content }])?;
        let around = rendered.split_once(MARK);
        let (before, after) =
            around.ok_or_else(|| HostError::Backend("the chat template drops the user's message".into()))?;
        Ok((before.to_owned(), after.to_owned()))
    }

    /// Tokens of one user message in the model's chat form, up to where the answer starts; of the bare text for a model
    /// without a chat template.
    ///
    /// # Errors
    /// When the template or the tokenizer refuses the text.
    pub fn chat_tokens(&self, text: &str) -> HostResult<Vec<u32>> {
        match &self.chat {
            Some(chat) => {
                let messages = [Message { role: "user", content: text.to_owned() }];
                self.tokenizer.encode(&chat.render(&messages)?)
            }
            None => self.tokenizer.encode(text),
        }
    }
}
