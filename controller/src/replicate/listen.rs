//! The daemon's figures by HTTP, for who scrapes them.

use std::convert::Infallible;
use std::net::SocketAddr;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::error::{Error, Result};

/// The text format of OpenMetrics.
const FORMAT: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

/// How many may be served at once: a scraper asks one at a time.
const AT_ONCE: usize = 16;

/// Answers `GET /metrics` with the newest text for as long as the task goes on that this gives.
///
/// # Errors
/// When nobody can listen there.
pub async fn serve(at: SocketAddr, text: watch::Receiver<String>) -> Result<JoinSet<()>> {
    let listener = TcpListener::bind(at).await;
    let listener = listener.map_err(|error| Error::io(format!("listening on {at}"), error))?;
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            // Who has connected and says nothing is given up by hyper in half a minute.
            if connections.len() >= AT_ONCE {
                connections.join_next().await;
            }
            if let Ok((stream, _)) = listener.accept().await {
                connections.spawn(connection(stream, text.clone()));
            }
        }
    });
    Ok(serving)
}

async fn connection(stream: TcpStream, text: watch::Receiver<String>) {
    let service = service_fn(|request| {
        let answer = answer(&request, &text);
        async { Ok::<_, Infallible>(answer) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service);
    // A client that goes away is no news.
    let _ = served.await;
}

fn answer(request: &Request<Incoming>, text: &watch::Receiver<String>) -> Response<Full<Bytes>> {
    let status = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => StatusCode::OK,
        (_, "/metrics") => StatusCode::METHOD_NOT_ALLOWED,
        _ => StatusCode::NOT_FOUND,
    };
    let body = match status {
        StatusCode::OK => text.borrow().clone(),
        _ => "there is GET /metrics, and nothing else\n".to_owned(),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    if status == StatusCode::OK {
        response.headers_mut().insert(CONTENT_TYPE, FORMAT);
    }
    response
}
