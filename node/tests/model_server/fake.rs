//! A server of one of our own models that answers in the recorded shapes of vLLM and SGLang.

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use consilium_node::scorer::ServerKind;
use consilium_node::worker::LoadedModel;
use consilium_node::worker::model::Packed;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

/// What is wrong with a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// 429, then 503, then good answers.
    Busy,
    /// Its own failure from this request on, counted from 0.
    FailsFrom(usize),
    /// The body ends before its announced length.
    CutsBody,
    /// The JSON ends in the middle, and the length says so.
    CutsJson,
    /// A redirect to another address.
    Redirects,
    /// No log-probabilities at all, as another server behind the same path would answer.
    NoLogprobs,
    /// Log-probabilities after a temperature of a half.
    Sharpened,
    /// Endless white space.
    Floods,
    /// Other values every time, as a stale cache gives.
    Changes,
    /// Token texts of another tokenizer.
    OtherTokenizer,
}

pub(crate) struct Fake {
    pub(crate) kind: ServerKind,
    pub(crate) model: LoadedModel,
    /// vLLM's --max-logprobs.
    pub(crate) max_logprobs: usize,
    pub(crate) key: Option<&'static str>,
    pub(crate) fault: Fault,
    pub(crate) requests: Mutex<Vec<Value>>,
}

/// A running server; dropping it ends it.
pub(crate) struct Running {
    pub(crate) fake: Arc<Fake>,
    address: SocketAddr,
    secure: bool,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Fake {
    pub(crate) fn new(kind: ServerKind, model: LoadedModel, fault: Fault) -> Self {
        Self {
            kind,
            model,
            max_logprobs: 20,
            key: None,
            fault,
            requests: Mutex::new(Vec::new()),
        }
    }

    pub(crate) fn start(self) -> Running {
        self.listen(TcpListener::bind("127.0.0.1:0").unwrap(), None)
    }

    /// At an address where another server was.
    pub(crate) fn start_at(self, url: &str) -> Running {
        self.listen(
            TcpListener::bind(url.trim_start_matches("http://")).unwrap(),
            None,
        )
    }

    /// Behind a certificate.
    pub(crate) fn start_tls(self, tls: ServerConfig) -> Running {
        self.listen(
            TcpListener::bind("127.0.0.1:0").unwrap(),
            Some(Arc::new(tls)),
        )
    }

    fn listen(self, listener: TcpListener, tls: Option<Arc<ServerConfig>>) -> Running {
        let address = listener.local_addr().unwrap();
        let (fake, ends) = (Arc::new(self), Arc::new(AtomicBool::new(false)));
        let (served, ended) = (Arc::clone(&fake), Arc::clone(&ends));
        let secure = tls.is_some();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if ended.load(Ordering::SeqCst) {
                    break;
                }
                let (fake, tls, stream) = (Arc::clone(&served), tls.clone(), stream.unwrap());
                std::thread::spawn(move || match tls {
                    None => fake.serve(stream),
                    Some(tls) => {
                        let session = ServerConnection::new(tls).ok()?;
                        fake.serve(StreamOwned::new(session, stream))
                    }
                });
            }
        });
        Running {
            fake,
            address,
            secure,
            ends,
            thread: Some(thread),
        }
    }

    /// One request of a connection, then its end. A client that is gone is no error.
    fn serve(&self, stream: impl Read + Write) -> Option<()> {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let path = line.split(' ').nth(1)?.to_owned();
        let (mut length, mut key) = (0, None);
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            let Some((name, value)) = line.trim_end().split_once(": ") else {
                break;
            };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.parse().ok()?,
                "authorization" => key = Some(value.to_owned()),
                _ => {}
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let request: Value = serde_json::from_slice(&body).ok()?;
        let number = {
            let mut requests = self.requests.lock().unwrap();
            requests.push(request.clone());
            requests.len() - 1
        };
        let stream = reader.get_mut();
        self.answer(stream, &path, key.as_deref(), &request, number)?;
        stream.flush().ok()
    }

    fn answer(
        &self,
        stream: &mut dyn Write,
        path: &str,
        key: Option<&str>,
        request: &Value,
        number: usize,
    ) -> Option<()> {
        let send = |stream: &mut dyn Write, status: &str, more: &str, body: &str, length: usize| {
            write!(
                stream,
                "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nserver: uvicorn\r\n{more}content-length: {length}\r\n\
                 connection: close\r\n\r\n{body}"
            )
            .ok()
        };
        let refuse = |stream: &mut dyn Write, status: &str, more: &str, message: &str| {
            let body = match self.kind {
                ServerKind::Vllm => {
                    json!({"error": {"message": message, "type": "BadRequestError", "param": null, "code": 400}})
                }
                ServerKind::Sglang => json!({"error": {"message": message}}),
            };
            let body = body.to_string();
            send(stream, status, more, &body, body.len())
        };
        let expected = match self.kind {
            ServerKind::Vllm => "/v1/completions",
            ServerKind::Sglang => "/generate",
        };
        if path != expected {
            return refuse(stream, "404 Not Found", "", "Not Found");
        }
        if self
            .key
            .is_some_and(|expected| key != Some(&format!("Bearer {expected}")))
        {
            return refuse(stream, "401 Unauthorized", "", "Unauthorized");
        }
        match self.fault {
            Fault::Busy if number == 0 => {
                return refuse(stream, "429 Too Many Requests", "", "queue full");
            }
            Fault::Busy if number == 1 => {
                return refuse(
                    stream,
                    "503 Service Unavailable",
                    "retry-after: 0\r\n",
                    "starting",
                );
            }
            Fault::FailsFrom(first) if number >= first => {
                return refuse(
                    stream,
                    "500 Internal Server Error",
                    "",
                    "CUDA out of memory. Tried to allocate 20.00 GiB",
                );
            }
            Fault::Redirects => {
                return refuse(
                    stream,
                    "307 Temporary Redirect",
                    "location: http://127.0.0.1:9/\r\n",
                    "moved",
                );
            }
            Fault::Floods => {
                write!(stream, "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n").ok()?;
                let space = vec![b' '; 1 << 16];
                while stream.write_all(&space).is_ok() {}
                return None;
            }
            _ => {}
        }
        let body = match self.kind {
            ServerKind::Vllm => self.vllm(request, number),
            ServerKind::Sglang => self.sglang(request, number),
        };
        match body {
            Err(message) => refuse(stream, "400 Bad Request", "", &message),
            Ok(body) => {
                let body = body.to_string();
                let (half, _) = body.split_at(body.floor_char_boundary(body.len() / 2));
                match self.fault {
                    Fault::CutsBody => send(stream, "200 OK", "", half, body.len()),
                    Fault::CutsJson => send(stream, "200 OK", "", half, half.len()),
                    _ => send(stream, "200 OK", "", &body, body.len()),
                }
            }
        }
    }

    /// Per token but the first: `top` likeliest ids with log-probabilities over the whole head, and the token itself.
    fn listed(&self, ids: &[u32], top: usize, number: usize) -> Vec<Vec<(u32, f32)>> {
        let mut packed = Packed::default();
        packed.push(ids.iter().copied());
        let rows: Vec<u32> = (0..u32::try_from(ids.len() - 1).unwrap()).collect();
        let pass = self.model.model.score(&packed, &rows).unwrap();
        let logits = self.model.model.logits(&pass.hidden).unwrap();
        let vocab = &self.model.vocab;
        let rows = logits.chunks(vocab.len()).zip(&ids[1..]);
        rows.map(|(row, &own)| {
            let scale = match self.fault {
                Fault::Sharpened => 2.0,
                Fault::Changes => 1.0 + number as f32,
                _ => 1.0,
            };
            let sum: f32 = row.iter().map(|v| v.exp()).sum();
            let mut listed: Vec<(u32, f32)> = row
                .iter()
                .zip(vocab.id_of_rank())
                .map(|(&v, &id)| (id, (v - sum.ln()) / scale))
                .collect();
            listed.sort_by(|a, b| b.1.total_cmp(&a.1));
            let own = listed[top.min(listed.len())..]
                .iter()
                .find(|(id, _)| *id == own)
                .copied();
            listed.truncate(top);
            listed.extend(own);
            listed
        })
        .collect()
    }

    fn text(&self, id: u32) -> String {
        let id = match self.fault {
            Fault::OtherTokenizer => (id + 7) % 300,
            _ => id,
        };
        let rank = self.model.vocab.rank_of_id()[id as usize];
        String::from_utf8_lossy(self.model.vocab.token_bytes(rank)).into_owned()
    }

    fn vllm(&self, request: &Value, number: usize) -> Result<Value, String> {
        let top = usize::try_from(request["prompt_logprobs"].as_u64().unwrap()).unwrap();
        if top > self.max_logprobs {
            return Err(format!(
                "Requested prompt logprobs of {top}, which is greater than max allowed: {} (parameter=prompt_logprobs, value={top})",
                self.max_logprobs
            ));
        }
        assert_eq!(request["model"], "big");
        assert_eq!(
            (&request["echo"], &request["max_tokens"]),
            (&json!(true), &json!(0))
        );
        let choices = request["prompt"].as_array().unwrap().iter().enumerate();
        let choices: Vec<Value> = choices
            .map(|(index, prompt)| {
                let ids: Vec<u32> = serde_json::from_value(prompt.clone()).unwrap();
                let mut lists = vec![Value::Null];
                for row in self.listed(&ids, top, number) {
                    let entries = row.iter().enumerate().map(|(rank, &(id, logprob))| {
                        let entry = json!({"logprob": logprob, "rank": rank + 1, "decoded_token": self.text(id)});
                        (id.to_string(), entry)
                    });
                    lists.push(Value::Object(entries.collect()));
                }
                json!({
                    "index": index, "text": "", "logprobs": null, "finish_reason": "length", "stop_reason": null,
                    "token_ids": [5], "prompt_token_ids": ids, "routed_experts": null,
                    "prompt_logprobs": (self.fault != Fault::NoLogprobs).then_some(lists),
                })
            })
            .collect();
        Ok(json!({
            "id": "cmpl-0f5d", "object": "text_completion", "created": 1_760_000_000, "model": "big", "choices": choices,
            "service_tier": null, "system_fingerprint": null, "kv_transfer_params": null,
            "usage": {"prompt_tokens": 9, "total_tokens": 10, "completion_tokens": 1, "prompt_tokens_details": null},
        }))
    }

    fn sglang(&self, request: &Value, number: usize) -> Result<Value, String> {
        assert_eq!(request["sampling_params"]["max_new_tokens"], 0);
        let with_text = request["return_text_in_logprobs"] == true;
        let prompts = request["input_ids"].as_array().unwrap().iter().enumerate();
        let results: Vec<Value> = prompts
            .map(|(index, prompt)| {
                let ids: Vec<u32> = serde_json::from_value(prompt.clone()).unwrap();
                let top = usize::try_from(request["top_logprobs_num"][index].as_u64().unwrap()).unwrap();
                let start = usize::try_from(request["logprob_start_len"][index].as_u64().unwrap()).unwrap();
                let text = |id| with_text.then(|| self.text(id));
                let entry = |&(id, value): &(u32, f32)| json!([value, id, text(id)]);
                let mut own = vec![json!([null, ids[start], text(ids[start])])];
                let mut likeliest = vec![Value::Null];
                let rows = self.listed(&ids, top, number);
                for (row, &id) in rows.iter().zip(&ids[1..]).skip(start) {
                    own.push(entry(row.iter().find(|pair| pair.0 == id).unwrap()));
                    likeliest.push(row[..top.min(row.len())].iter().map(entry).collect());
                }
                let (own, likeliest) = if self.fault == Fault::NoLogprobs {
                    (Value::Null, Value::Null)
                } else {
                    (own.into(), likeliest.into())
                };
                json!({
                    "text": "", "output_ids": [],
                    "meta_info": {
                        "id": "a7c9", "finish_reason": {"type": "length", "length": 0}, "prompt_tokens": ids.len(),
                        "weight_version": "default", "input_token_logprobs": own, "output_token_logprobs": [],
                        "input_top_logprobs": likeliest, "output_top_logprobs": [], "completion_tokens": 0,
                        "cached_tokens": 0, "e2e_latency": 0.02,
                    },
                })
            })
            .collect();
        Ok(results.into())
    }
}

impl Running {
    pub(crate) fn url(&self) -> String {
        let scheme = if self.secure { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    pub(crate) fn count(&self) -> usize {
        self.fake.requests.lock().unwrap().len()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
