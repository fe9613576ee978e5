//! The byte stream of a peer cut into messages. Framing errors keep the reaction that RFC 4271 §6.1 prescribes.

use std::io;

use bytes::BytesMut;
use rustbgpd_wire::{DecodeError, MAX_MESSAGE_LEN, Message, decode_message, peek_message_length};
use tokio::io::{AsyncRead, AsyncReadExt};

/// One read takes at most this much: a peer that floods is read in turns with everything else.
const READ_CHUNK: usize = 64 << 10;

/// Why no further message comes.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("the peer closed the connection")]
    Closed,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What was read and is not yet handled: less than one message after [`Frames::next`] gave `None`.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    buffer: BytesMut,
}

impl Frames {
    /// Waits for bytes. Cancel-safe: bytes are in the buffer or in the socket.
    pub(crate) async fn fill(
        &mut self,
        from: &mut (impl AsyncRead + Unpin),
    ) -> Result<(), ReadError> {
        self.buffer.reserve(READ_CHUNK);
        let mut limited = from.take(READ_CHUNK as u64);
        match limited.read_buf(&mut self.buffer).await? {
            0 => Err(ReadError::Closed),
            _ => Ok(()),
        }
    }

    /// The next whole message. Only RFC 4271's 4,096 bytes are accepted: Extended Message is not offered.
    pub(crate) fn next(&mut self) -> Result<Option<Message>, DecodeError> {
        let Some(length) = peek_message_length(&self.buffer, MAX_MESSAGE_LEN)? else {
            return Ok(None);
        };
        if self.buffer.len() < usize::from(length) {
            return Ok(None);
        }
        let mut whole = self.buffer.split_to(usize::from(length)).freeze();
        decode_message(&mut whole, MAX_MESSAGE_LEN).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustbgpd_wire::encode_message;

    #[test]
    fn messages_come_out_whole_however_the_bytes_arrive() {
        let keepalive = encode_message(&Message::Keepalive).expect("a keepalive");
        let stream = [&keepalive[..], &keepalive[..], &keepalive[..5]].concat();
        let mut frames = Frames::default();
        let mut seen = 0;
        for byte in stream {
            frames.buffer.extend_from_slice(&[byte]);
            while let Some(message) = frames.next().expect("well-formed") {
                assert_eq!(message, Message::Keepalive);
                seen += 1;
            }
        }
        assert_eq!(seen, 2);
        assert_eq!(frames.buffer.len(), 5);
    }

    #[test]
    fn a_length_past_4096_is_refused_before_it_is_buffered() {
        let mut frames = Frames::default();
        frames.buffer.extend_from_slice(&[0xff; 16]);
        frames.buffer.extend_from_slice(&4097u16.to_be_bytes());
        frames.buffer.extend_from_slice(&[2]);
        let wrong = frames.next().expect_err("too long");
        let (code, subcode, data) = wrong.to_notification();
        assert_eq!(
            (code.as_u8(), subcode, &data[..]),
            (1, 2, &4097u16.to_be_bytes()[..])
        );
    }
}
