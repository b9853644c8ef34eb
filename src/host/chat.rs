//! Chat templates: the Jinja program of a GGUF file turns messages into a prompt.

use minijinja::{Environment, Error, ErrorKind, context};
use serde::Serialize;

use super::HostResult;
use super::gguf::Gguf;

/// One turn of a conversation.
#[derive(Clone, Debug, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: &'static str,
    /// Text.
    pub content: String,
}

/// The chat template of a model.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// The template of a model file; `None` for a base model without one.
    ///
    /// # Errors
    /// When the template is no valid Jinja, or a field has a wrong type.
    pub fn from_gguf(gguf: &Gguf) -> HostResult<Option<Self>> {
        let Some(source) = gguf.text("tokenizer.chat_template")? else { return Ok(None) };
        let token = |field: &str| -> HostResult<String> {
            let id = gguf.count(&format!("tokenizer.ggml.{field}"))?;
            let text = id.zip(gguf.list("tokenizer.ggml.tokens")?).and_then(|(id, tokens)| tokens.get(id));
            Ok(text.and_then(|text| text.to_string().ok()).cloned().unwrap_or_default())
        };
        Self::new(source.to_owned(), token("bos_token_id")?, token("eos_token_id")?).map(Some)
    }

    /// A template from its source, with the texts of the start and end tokens.
    ///
    /// # Errors
    /// When the template is no valid Jinja.
    pub fn new(source: String, bos: String, eos: String) -> HostResult<Self> {
        let mut environment = Environment::new();
        // As Hugging Face's renderer sets them: templates are written against it.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned(NAME, source)?;
        Ok(Self { environment, bos, eos })
    }

    /// The prompt for an answer to `messages`.
    ///
    /// # Errors
    /// When the template refuses the messages.
    pub fn render(&self, messages: &[Message]) -> HostResult<String> {
        Ok(self.environment.get_template(NAME)?.render(context! {
            messages,
            add_generation_prompt => true,
            bos_token => &self.bos,
            eos_token => &self.eos,
        })?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(content: &str) -> Message {
        Message { role: "user", content: content.into() }
    }

    #[test]
    fn template_sees_messages_tokens_and_string_methods() {
        let source = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}:{{ m.content.strip() }}]{% endfor %}\
                      {% if add_generation_prompt %}<go>{% endif %}";
        let template = ChatTemplate::new(source.into(), "<s>".into(), "</s>".into()).unwrap();
        assert_eq!(template.render(&[user(" hi ")]).unwrap(), "<s>[user:hi]<go>");
    }

    #[test]
    fn what_the_template_raises_is_the_error() {
        let source = "{{ raise_exception('roles must alternate') }}";
        let template = ChatTemplate::new(source.into(), String::new(), String::new()).unwrap();
        let message = template.render(&[user("x")]).unwrap_err().to_string();
        assert!(message.contains("roles must alternate"), "{message}");
    }
}
