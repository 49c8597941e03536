//! The option phase without I/O: an option in, answers and the next step out.
//!
//! Invariants: with TLS required, nothing but STARTTLS and ABORT is answered with more than "TLS first" before it is
//! up; what was negotiated before TLS is forgotten (whoever sat on the plain line could have said it); a metadata
//! context counts for the export it was asked for and no other; a wrong option is answered, never fatal.
//! Called by `connection`.

use std::sync::Arc;

use super::Export;
use crate::format::nbd::option::{ContextQuery, ExportQuery, OptionRequest};
use crate::format::nbd::reply::{self, OptionReply};
use crate::format::nbd::request::Allowed;
use crate::format::nbd::{ALLOCATION_CONTEXT, ALLOCATION_CONTEXT_ID, flags_of_export};

/// What is served, by name.
pub(super) struct Exports(Vec<Arc<dyn Export>>);

impl Exports {
    pub(super) fn new(exports: Vec<Arc<dyn Export>>) -> Self {
        Self(exports)
    }

    /// The place of an export; the empty name is the only one there is, where there is only one.
    fn find(&self, name: &str) -> Option<usize> {
        let named = self.0.iter().position(|export| export.name() == name);
        named.or((name.is_empty() && self.0.len() == 1).then_some(0))
    }
}

/// How things stand with TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tls {
    NotOffered,
    Required,
    Established,
}

/// What happens once the answer is sent.
pub(super) enum Next {
    /// The next option.
    Continue,
    /// TLS begins.
    StartTls,
    /// The export is opened, and if that succeeds the requests begin; `answer` was empty.
    Enter(Entry),
    /// The connection ends.
    Close,
}

/// A chosen export.
pub(super) struct Entry {
    pub(super) export: Arc<dyn Export>,
    pub(super) allowed: Allowed,
    /// What the client is told when the export is open.
    pub(super) welcome: Vec<u8>,
    /// The option to be refused when it is not; `None` where the protocol knows no refusal.
    option: Option<u32>,
}

impl Entry {
    /// What the client is told when the export cannot be opened; `None`: it is hung up on.
    pub(super) fn refusal(&self, reason: &str) -> Option<Vec<u8>> {
        self.option.map(|option| refusal(option, OptionReply::ErrUnknown, reason))
    }
}

/// What a client has negotiated so far.
pub(super) struct Negotiation<'a> {
    exports: &'a Exports,
    tls: Tls,
    no_zeroes: bool,
    structured: bool,
    /// The export for which `base:allocation` was chosen.
    allocation_of: Option<usize>,
}

fn refusal(option: u32, error: OptionReply, reason: &str) -> Vec<u8> {
    let mut out = Vec::new();
    reply::put_option_reply(&mut out, option, error, reply::bounded(reason).as_bytes());
    out
}

fn acknowledgement(option: u32) -> Vec<u8> {
    let mut out = Vec::new();
    reply::put_option_reply(&mut out, option, OptionReply::Ack, &[]);
    out
}

impl<'a> Negotiation<'a> {
    pub(super) fn new(exports: &'a Exports, tls: Tls, no_zeroes: bool) -> Self {
        Self { exports, tls, no_zeroes, structured: false, allocation_of: None }
    }

    /// Takes one option; gives the answer and what comes after it.
    pub(super) fn handle_option(&mut self, option: u32, data: &[u8]) -> (Vec<u8>, Next) {
        let request = match OptionRequest::decode(option, data) {
            Ok(request) => request,
            Err(error) => {
                if matches!(option, 10) {
                    self.allocation_of = None; // a failed choice replaces the one before it too
                }
                return (refusal(option, OptionReply::ErrInvalid, &error.to_string()), Next::Continue);
            }
        };
        if self.tls == Tls::Required {
            return match request {
                OptionRequest::StartTls => (acknowledgement(option), Next::StartTls),
                OptionRequest::Abort => (acknowledgement(option), Next::Close),
                OptionRequest::ExportName(_) => (Vec::new(), Next::Close),
                _ => {
                    let reason = "this server speaks TLS only";
                    (refusal(option, OptionReply::ErrTlsRequired, reason), Next::Continue)
                }
            };
        }
        let answer = match request {
            OptionRequest::ExportName(name) => return self.export_name(&name),
            OptionRequest::Go(query) => return self.go(option, &query),
            OptionRequest::Abort => return (acknowledgement(option), Next::Close),
            OptionRequest::Info(query) => self.info(option, &query).map(|(_, answer)| answer),
            OptionRequest::List => Ok(self.list(option)),
            OptionRequest::StartTls if self.tls == Tls::Established => {
                Err((OptionReply::ErrInvalid, "TLS is up already"))
            }
            OptionRequest::StartTls => Err((OptionReply::ErrPolicy, "this server has no TLS configured")),
            OptionRequest::StructuredReply => {
                self.structured = true;
                Ok(acknowledgement(option))
            }
            OptionRequest::ListContexts(query) => self.list_contexts(option, &query),
            OptionRequest::SetContexts(query) => self.set_contexts(option, &query),
            OptionRequest::Other(_) => Err((OptionReply::ErrUnsupported, "not known to this server")),
        };
        (answer.unwrap_or_else(|(error, reason)| refusal(option, error, reason)), Next::Continue)
    }

    fn list(&self, option: u32) -> Vec<u8> {
        let mut out = Vec::new();
        for export in &self.exports.0 {
            reply::put_option_reply(&mut out, option, OptionReply::Server, &reply::listed(export.name()));
        }
        out.extend(acknowledgement(option));
        out
    }

    fn find(&self, name: &str) -> Result<usize, Refusal> {
        self.exports.find(name).ok_or((OptionReply::ErrUnknown, "there is no export of that name"))
    }

    fn allowed(&self, place: usize) -> Option<(Arc<dyn Export>, Allowed)> {
        let export = Arc::clone(self.exports.0.get(place)?);
        let allowed = Allowed {
            size_bytes: export.size_bytes(),
            writable: export.writable(),
            structured: self.structured,
            allocation: self.structured && self.allocation_of == Some(place),
        };
        Some((export, allowed))
    }

    /// The export asked about, and everything there is to say about it.
    fn info(&self, option: u32, query: &ExportQuery) -> Result<(usize, Vec<u8>), Refusal> {
        let place = self.find(&query.name)?;
        let (export, allowed) = self.allowed(place).ok_or(GONE)?;
        let flags = flags_of_export(allowed.writable, allowed.structured);
        let mut out = Vec::new();
        let mut say = |data: Vec<u8>| reply::put_option_reply(&mut out, option, OptionReply::Info, &data);
        say(reply::about_export(allowed.size_bytes, flags));
        say(reply::about_block_size());
        if query.wanted.contains(&reply::INFO_NAME) {
            say(reply::about_name(export.name()));
        }
        out.extend(acknowledgement(option));
        Ok((place, out))
    }

    fn go(&self, option: u32, query: &ExportQuery) -> (Vec<u8>, Next) {
        let entered = self.info(option, query).and_then(|(place, welcome)| {
            let (export, allowed) = self.allowed(place).ok_or(GONE)?;
            Ok(Entry { export, allowed, welcome, option: Some(option) })
        });
        match entered {
            Ok(entry) => (Vec::new(), Next::Enter(entry)),
            Err((error, reason)) => (refusal(option, error, reason), Next::Continue),
        }
    }

    fn export_name(&self, name: &str) -> (Vec<u8>, Next) {
        let Some((export, allowed)) = self.exports.find(name).and_then(|place| self.allowed(place)) else {
            return (Vec::new(), Next::Close);
        };
        let flags = flags_of_export(allowed.writable, allowed.structured);
        let welcome = reply::export_chosen(allowed.size_bytes, flags, self.no_zeroes);
        (Vec::new(), Next::Enter(Entry { export, allowed, welcome, option: None }))
    }

    fn list_contexts(&self, option: u32, query: &ContextQuery) -> Result<Vec<u8>, Refusal> {
        self.find(&query.name)?;
        let all = query.queries.is_empty();
        let matches = |query: &String| query == ALLOCATION_CONTEXT || query == "base:";
        Ok(contexts(option, (all || query.queries.iter().any(matches)).then_some(0)))
    }

    fn set_contexts(&mut self, option: u32, query: &ContextQuery) -> Result<Vec<u8>, Refusal> {
        self.allocation_of = None;
        if !self.structured {
            return Err((OptionReply::ErrInvalid, "ask for structured replies first"));
        }
        let place = self.find(&query.name)?;
        let chosen = query.queries.iter().any(|query| query == ALLOCATION_CONTEXT);
        self.allocation_of = chosen.then_some(place);
        Ok(contexts(option, chosen.then_some(ALLOCATION_CONTEXT_ID)))
    }
}

type Refusal = (OptionReply, &'static str);

const GONE: Refusal = (OptionReply::ErrUnknown, "there is no such export");

/// The one context under `id`, or none, and the end of the list.
fn contexts(option: u32, id: Option<u32>) -> Vec<u8> {
    let mut out = Vec::new();
    if let Some(id) = id {
        let data = reply::context(id, ALLOCATION_CONTEXT);
        reply::put_option_reply(&mut out, option, OptionReply::Context, &data);
    }
    out.extend(acknowledgement(option));
    out
}
