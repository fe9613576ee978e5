package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"time"
)

// issuer of ServiceAccount tokens, and their audience.
const issuer = "https://kubernetes.default.svc.cluster.local"

// shortest lifetime, in seconds, that the API server grants.
const shortest = 600

// leeway that the API server gives a token after its expiry.
const leeway = 60

// token of a ServiceAccount, from the API server; one that must live shorter than the server allows is signed here with the
// server's key. Such a token is refused once its lifetime is over: its expiry lies the server's leeway before that.
func (p *plane) token(ctx context.Context, namespace, account, seconds string) (string, error) {
	lifetime, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return "", err
	}
	path := fmt.Sprintf("%s/api/v1/namespaces/%s/serviceaccounts/%s", p.server, namespace, account)
	if lifetime >= shortest {
		var granted struct{ Status struct{ Token string } }
		body := fmt.Sprintf(`{"apiVersion":"authentication.k8s.io/v1","kind":"TokenRequest","spec":{"expirationSeconds":%d}}`, lifetime)
		err := p.call(ctx, http.MethodPost, path+"/token", body, &granted)
		return granted.Status.Token, err
	}
	var found struct{ Metadata struct{ UID string } }
	if err := p.call(ctx, http.MethodGet, path, "", &found); err != nil {
		return "", err
	}
	now := time.Now().Unix()
	return p.pki.sign(map[string]any{
		"iss": issuer, "aud": []string{issuer}, "sub": "system:serviceaccount:" + namespace + ":" + account,
		"iat": now, "nbf": now, "exp": now + lifetime - leeway,
		"kubernetes.io": map[string]any{"namespace": namespace, "serviceaccount": map[string]string{"name": account, "uid": found.Metadata.UID}},
	})
}

// call asks the API server as the administrator.
func (p *plane) call(ctx context.Context, method, url, body string, into any) error {
	request, err := http.NewRequestWithContext(ctx, method, url, bytes.NewBufferString(body))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := p.admin.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	if response.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %s: %s", method, url, response.Status, text)
	}
	return json.Unmarshal(text, into)
}

// sign makes a JSON web token, ES256 (RFC 7518 §3.4).
func (p *pki) sign(claims any) (string, error) {
	text, err := os.ReadFile(p.path("sa.key"))
	if err != nil {
		return "", err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return "", fmt.Errorf("%s: no PEM", p.path("sa.key"))
	}
	key, err := x509.ParseECPrivateKey(block.Bytes)
	if err != nil {
		return "", err
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		return "", err
	}
	encode := base64.RawURLEncoding.EncodeToString
	signed := encode([]byte(`{"alg":"ES256","typ":"JWT"}`)) + "." + encode(payload)
	digest := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		return "", err
	}
	signature := append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
	return signed + "." + encode(signature), nil
}
